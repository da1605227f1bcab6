"""The micro teacher's model card: text, tables, loss curve, and a grid of its images beside real ones."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from fewstep.atomic import atomic_file, write_text
from fewstep.data.images import grid
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.teacher_quality import SCORES, STEPS, Quality, generated, prompts_of
from fewstep.evaluation.images import as_uint8
from fewstep.models.pipeline import TextToImagePipeline

GRID_IMAGES = 64
ACCURACY_TITLES = "object (of 130) | style | background | object by the nearest real emoji"

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
language: [en, zh]
---

# micro: a small Z-Image for laptops

The teacher model of fewstep's emoji dataset: Z-Image's classes and folder layout at a small size. It generates 64x64
images of 130 objects in two styles on eight background colors from English or Chinese prompts such as
"a noto emoji of a red apple on a blue background" or "蓝色背景上的红苹果，twemoji 风格". Its purpose is to develop and
test distillation methods; it has no other use.

Run it with `fewstep generate micro "a noto emoji of a red apple on a blue background"`, or load it with diffusers'
`ZImagePipeline`.

| component | class | parameters |
|---|---|---|
{components}

The files are fp16; `fewstep.load` converts them to fp32.

![Real and generated images](samples.png)

{grid_images} held-out prompts; in each pair a real image is on the left, the teacher's on the right.

## Quality

{steps} steps, guidance_scale {guidance:g}, {prompts} prompts per row. The emoji classifier, which was never used as a
reward, measures the accuracies. Its own accuracy on real images of unseen combinations is
{classifier[object_acc]:.1%} for objects, {classifier[style_acc]:.1%} for styles and
{classifier[background_acc]:.1%} for backgrounds. The nearest real emoji is found with features of a network that was
not trained on this dataset (`docs/guides/evaluation.md`).

| split, language | {titles} |
|---|---|---|---|---|
{quality}

The same test prompts in every row. The Fréchet distance is that of the network's features to other real images of these
prompts; sharpness is the high-frequency energy relative to theirs.

| images | {titles} | Fréchet distance | sharpness |
|---|---|---|---|---|---|---|
{compared}

Other guidance scales, on other prompts of the training split:

| guidance_scale | {titles} |
|---|---|---|---|---|
{tried}

## Training

{training}

![Training loss](loss.png)

Data: `docs/guides/emoji-dataset.md`. The images are Noto Emoji (Apache-2.0) and Twemoji (CC-BY-4.0);
the names are Unicode CLDR (Unicode-3.0).

```yaml
{recipe}```
"""

TRAINING = """\
Flow matching in {stages}, {minutes:.0f} minutes in all on {threads} CPU cores ({cpu}) shared with other work, without a
GPU:

| recipe | steps | batch size | minutes |
|---|---|---|---|
{rows}

`docs/guides/micro-model.md` lists the commands that train the autoencoder, the text encoder and the transformer in
order. The recipe of the last stage:"""


def percent_row(first: str, values: Quality) -> str:
    """A row of the tables of accuracies, as percentages."""
    return f"| {first} | " + " | ".join(f"{values[key]:.1%}" for key in SCORES) + " |"


def compared_row(first: str, values: Quality) -> str:
    """A row of the table beside real images: also the Frechet distance to them and the sharpness."""
    return percent_row(first, values) + f" {values['fd_real']:.0f} | {values['sharpness']:.2f} |"


def cpu_name() -> str:
    """The name of this machine's CPU, or of its architecture."""
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())


def sample_grid(model: TextToImagePipeline, guidance: float) -> Image.Image:
    """GRID_IMAGES pairs of a real image (left) and the model's for the same test prompt."""
    dataset = EmojiDataset.load()
    specs = dataset.sample(GRID_IMAGES, "test", seed=8)
    real = as_uint8(dataset.render(specs, torch.Generator().manual_seed(8)))
    images = generated(model, prompts_of(specs), STEPS, guidance)
    return grid(torch.stack([real, images], dim=1).flatten(0, 1), columns=16)


def write_loss_curve(metrics: list[dict[str, float]], file: Path) -> None:
    """Plot the losses of all stages, averaged over 20 logged values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    for key, label in (("teacher/loss", "all"), ("teacher/noisy", "sigma > 0.75"), ("teacher/clean", "sigma < 0.75")):
        lines = [(line["step"], line[key]) for line in metrics if key in line]
        groups = [lines[start : start + 20] for start in range(0, len(lines), 20)]
        steps = [group[-1][0] for group in groups]
        axes.plot(steps, [sum(v for _, v in group) / len(group) for group in groups], label=label, linewidth=0.9)
    axes.set(xlabel="step", ylabel="flow matching loss", ylim=(0, 1.0))
    axes.legend(frameon=False)
    with atomic_file(file) as aside:
        figure.savefig(aside, dpi=110, format="png")


def write_card(
    out: Path,
    model: TextToImagePipeline,
    guidance: float,
    prompts: int,
    quality: dict[str, dict[str, Quality]],
    tried: list[Quality],
    classifier: Quality,
    stages: list[dict[str, Any]],
) -> str:
    """Write README.md to ``out``; returns its section on quality.

    Args:
        quality: the tables "by_split" and "compared".
        tried: a row for each guidance scale.
        classifier: its accuracies on real images.
        stages: recipe, steps and seconds of each training stage, in order.
    """
    modules = {"transformer": model.transformer, "vae": model.vae, "text_encoder": model.text_encoder}
    components = [
        f"| {name} | `{type(module).__name__}` | {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M |"
        for name, module in modules.items()
    ]
    rows = [
        f"| `{stage['recipe']['name']}` | {stage['steps']} | {stage['recipe']['train']['batch_size']} "
        f"| {stage['seconds'] / 60:.0f} |"
        for stage in stages
    ]
    training = TRAINING.format(
        stages=f"{len(stages)} stages" if len(stages) > 1 else "one stage",
        minutes=sum(stage["seconds"] for stage in stages) / 60,
        threads=torch.get_num_threads(),
        cpu=cpu_name(),
        rows="\n".join(rows),
    )
    card = CARD.format(
        components="\n".join(components),
        grid_images=GRID_IMAGES,
        steps=STEPS,
        guidance=guidance,
        prompts=prompts,
        classifier=classifier,
        titles=ACCURACY_TITLES,
        quality="\n".join(percent_row(cell, values) for cell, values in quality["by_split"].items()),
        compared="\n".join(compared_row(label, values) for label, values in quality["compared"].items()),
        tried="\n".join(percent_row(f"{row['guidance_scale']:g}", row) for row in tried),
        training=training,
        recipe=yaml.safe_dump(stages[-1]["recipe"], sort_keys=False, allow_unicode=True),
    )
    write_text(out / "README.md", card)
    return card[card.index("## Quality") : card.index("## Training")]
