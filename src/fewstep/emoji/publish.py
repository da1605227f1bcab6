"""Packs a trained micro teacher for publication: half-precision files, its best guidance scale, and a model card."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from fewstep.emoji.classifier import ACCURACIES
from fewstep.emoji.dataset import LANGUAGES, NUM_TEMPLATES, EmojiDataset, EmojiSpec, Split
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.scorer import EmojiScorer
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.progress import track
from fewstep.training.tracking import read_metrics

GUIDANCE_SCALES = (2.0, 3.0, 4.0)  # candidates
STEPS = 50
COLUMNS = (*ACCURACIES, "nearest_real_acc")  # of the card's tables


def accuracy(model: TextToImagePipeline, specs: list[EmojiSpec], guidance: float) -> dict[str, float]:
    """Mean scores of images at 50 steps: object, style and background by the classifier, object by the nearest real
    emoji."""
    dataset = EmojiDataset.load()
    prompts = [dataset.prompt(spec, i % NUM_TEMPLATES) for i, spec in enumerate(specs)]
    images = generate(model, prompts, SamplingParams(steps=STEPS, guidance_scale=guidance)).images
    scores = EmojiScorer().score(images, prompts) | NearestReal().score(images, prompts)
    return {key: values.mean().item() for key, values in scores.items()}


def best_guidance(model: TextToImagePipeline, prompts: int) -> tuple[float, list[dict[str, float]]]:
    """The guidance scale with the highest object accuracy on training prompts, and the accuracies of all candidates."""
    specs = EmojiDataset.load().sample(prompts, "train", seed=3)
    tried = [{"guidance_scale": scale, **accuracy(model, specs, scale)} for scale in track(GUIDANCE_SCALES, "guidance")]
    return max(tried, key=lambda row: row["object_acc"])["guidance_scale"], tried


def measure_quality(model: TextToImagePipeline, guidance: float, prompts: int) -> dict[str, dict[str, float]]:
    """Accuracy by split and language, on other prompts than those that selected the guidance scale."""
    dataset = EmojiDataset.load()
    splits: tuple[Split, ...] = ("train", "test")
    cells = [(split, language) for split in splits for language in LANGUAGES]
    quality = {}
    for split, language in track(cells, "measuring accuracy"):
        pool = dataset.sample(len(dataset.specs(split)), split, seed=4)
        specs = [spec for spec in pool if spec.language == language][:prompts]
        quality[f"{split}, {language}"] = accuracy(model, specs, guidance)
    return quality


def convert_to_fp16(folder: Path) -> None:
    """Rewrite every safetensors file in fp16, which rounds weights less than bf16. Loading converts to fp32."""
    for file in folder.rglob("*.safetensors"):
        save_file({name: t.half().contiguous() for name, t in load_file(file).items()}, file, {"format": "pt"})


def write_loss_curve(metrics: list[dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in metrics]
    for key, label in (("teacher/loss", "all"), ("teacher/noisy", "sigma > 0.75"), ("teacher/clean", "sigma < 0.75")):
        axes.plot(steps, [line.get(key, float("nan")) for line in metrics], label=label, linewidth=0.9)
    axes.set(xlabel="step", ylabel="flow matching loss", ylim=(0, 1.2))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


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

## Quality

{steps} steps, guidance_scale {guidance:g}, {prompts} prompts per row. The emoji classifier, which was never used as a
reward, measures the accuracies. Its own accuracy on real images of unseen combinations is
{classifier[object_acc]:.1%} for objects, {classifier[style_acc]:.1%} for styles and
{classifier[background_acc]:.1%} for backgrounds.

| split, language | object (of 130) | style | background | object by the nearest real emoji |
|---|---|---|---|---|
{quality}

The guidance scale was selected by the object accuracy on other prompts of the training split:

| guidance_scale | object | style | background | object by the nearest real emoji |
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
Flow matching, {steps} steps, batch size {batch_size}, {minutes:.0f} minutes on {threads} CPU cores ({cpu}) shared with
other work, without a GPU.{stages} The autoencoder was trained with the recipes `micro-vae`, `micro-vae-decoder` and
`micro-vae-core`, the text encoder with `micro-text-encoder` (contrastively with latents, on the training split only).
`docs/guides/micro-model.md` lists the commands in order. The recipe of the last stage:"""


def percent_row(first: str, values: dict[str, float]) -> str:
    return f"| {first} | " + " | ".join(f"{values[key]:.1%}" for key in COLUMNS) + " |"


def cpu_name() -> str:
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())


def publish(runs: list[Path], out: Path, prompts: int) -> str:
    """Write the model of the last run, its card, loss curve and quality.json to ``out``; returns the card's quality
    section.

    Args:
        runs: directories of the teacher's training stages, in order.
        prompts: prompts per row of the card's tables.
    """
    run = runs[-1]
    model = load(run / "model")
    guidance, tried = best_guidance(model, prompts)
    model.generation_config.guidance_scale = guidance
    model.save(out)
    convert_to_fp16(out)
    model = load(out)  # the quality is that of the published weights

    quality = measure_quality(model, guidance, prompts)
    metrics, steps, seconds = [], 0, 0.0
    for stage in runs:
        lines = read_metrics(stage / "metrics.jsonl")
        metrics += [{**line, "step": steps + line["step"]} for line in lines]
        steps, seconds = metrics[-1]["step"], seconds + lines[-1]["seconds"]
    write_loss_curve(metrics, out / "loss.png")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    modules = {"transformer": model.transformer, "vae": model.vae, "text_encoder": model.text_encoder}
    components = [
        f"| {name} | `{type(module).__name__}` | {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M |"
        for name, module in modules.items()
    ]
    training = TRAINING.format(
        steps=steps,
        batch_size=recipe["train"]["batch_size"],
        minutes=seconds / 60,
        threads=torch.get_num_threads(),
        cpu=cpu_name(),
        stages=f" {len(runs)} stages, each with a new learning rate schedule." if len(runs) > 1 else "",
    )
    card = CARD.format(
        components="\n".join(components),
        steps=STEPS,
        guidance=guidance,
        prompts=prompts,
        classifier=EmojiScorer().accuracy,
        quality="\n".join(percent_row(cell, values) for cell, values in quality.items()),
        tried="\n".join(percent_row(f"{row['guidance_scale']:g}", row) for row in tried),
        training=training,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "quality.json").write_text(json.dumps({"guidance": tried, "quality": quality}, indent=2) + "\n")
    return card[card.index("## Quality") : card.index("## Training")]
