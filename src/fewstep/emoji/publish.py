"""Packs a trained micro teacher for shipping: half-precision files, its best guidance, and a model card.

python -m fewstep.micro.ship runs/micro-teacher runs/micro-teacher-more --out src/fewstep/assets/micro
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from fewstep.emoji.classifier import EmojiClassifier, correct
from fewstep.emoji.dataset import LANGUAGES, TEMPLATES, EmojiDataset, EmojiSpec, Split
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.progress import track
from fewstep.training.tracking import read_metrics

GUIDANCE = (2.0, 3.0, 4.0)  # scales that are tried
STEPS = 50
KEYS = ("name_top1", "style_top1", "color_top1")


def accuracy(
    model: TextToImagePipeline, judge: EmojiClassifier, concepts: list[EmojiSpec], guidance: float
) -> dict[str, float]:
    """Shares of images in which the judge sees the name, style and color that were asked for, at 50 steps."""
    world = EmojiDataset.load()
    prompts = [world.prompt(concept, i % len(TEMPLATES["en"])) for i, concept in enumerate(concepts)]
    images = generate(model, prompts, SamplingParams(steps=STEPS, guidance_scale=guidance)).images
    return {key: right.float().mean().item() for key, right in correct(judge(images), concepts).items()}


def best_guidance(
    model: TextToImagePipeline, judge: EmojiClassifier, prompts: int
) -> tuple[float, list[dict[str, float]]]:
    """The guidance with most names right on training combinations, and the figures of all that were tried."""
    concepts = EmojiDataset.load().sample(prompts, "train", seed=3)
    tried = [{"guidance_scale": g, **accuracy(model, judge, concepts, g)} for g in track(GUIDANCE, "guidance")]
    return max(tried, key=lambda row: row["name_top1"])["guidance_scale"], tried


def judged(
    model: TextToImagePipeline, judge: EmojiClassifier, guidance: float, prompts: int
) -> dict[str, dict[str, float]]:
    """Accuracy by split and language, on other prompts and seeds than the guidance was chosen with."""
    world = EmojiDataset.load()
    splits: tuple[Split, ...] = ("train", "heldout")
    cells = [(split, language) for split in splits for language in LANGUAGES]
    found = {}
    for split, language in track(cells, "judging"):
        pool = world.sample(10_000 if split == "train" else len(world.concepts(split)), split, seed=4)
        concepts = [c for c in pool if c.language == language][:prompts]
        found[f"{split}, {language}"] = accuracy(model, judge, concepts, guidance)
    return found


def halve(folder: Path) -> None:
    """Rewrite every safetensors file in fp16. Loading brings fp32 back; fp16 keeps more digits of weights than bf16."""
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

# micro: a Z-Image small enough for a laptop

The teacher of fewstep's emoji world: the classes and folder layout of Z-Image with small numbers. It draws 130 things
in two styles on eight background colors at 64x64, from English or Chinese prompts such as
"a noto emoji of a red apple on a blue background" or "蓝色背景上的红苹果，twemoji 风格". It is made to be distilled,
measured and taken apart, and for nothing else.

`fewstep generate micro "a noto emoji of a red apple on a blue background"`; diffusers' `ZImagePipeline` opens it too.

| part | class | parameters |
|---|---|---|
{parts}

The files are fp16; `fewstep.load` brings fp32 back.

## Quality

{steps} steps, guidance_scale {guidance:g}; {prompts} prompts a row, seeds of their own. The judge is a classifier that
was never a reward; on real images of unseen combinations it is right itself for {judge[name_top1]:.1%} of names,
{judge[style_top1]:.1%} of styles and {judge[color_top1]:.1%} of colors.

| combinations, language | name (of 130) | style | color |
|---|---|---|---|
{quality}

The guidance was chosen by the names on other prompts of the training combinations:

| guidance_scale | name | style | color |
|---|---|---|---|
{tried}

## Training

{training}

![Loss](loss.png)

Data: `docs/emoji-world.md`; images are Noto Emoji (Apache-2.0) and Twemoji (CC-BY-4.0), names Unicode CLDR
(Unicode-3.0).

```yaml
{recipe}```
"""


def percent_row(first: str, figures: dict[str, float]) -> str:
    return f"| {first} | " + " | ".join(f"{figures[key]:.1%}" for key in KEYS) + " |"


def processor() -> str:
    """The CPU's name."""
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())


def ship(runs: list[Path], out: Path, prompts: int) -> None:
    run = runs[-1]
    model = load(run / "model")
    judge = EmojiClassifier.load()
    guidance, tried = best_guidance(model, judge, prompts)
    model.generation_config.guidance_scale = guidance
    model.save(out)
    halve(out)
    model = load(out)  # what is measured is what is shipped

    quality = judged(model, judge, guidance, prompts)
    metrics, steps, seconds = [], 0, 0.0
    for stage in runs:
        lines = read_metrics(stage / "metrics.jsonl")
        metrics += [{**line, "step": steps + line["step"]} for line in lines]
        steps, seconds = metrics[-1]["step"], seconds + lines[-1]["seconds"]
    stages = f"In {len(runs)} stages, with a new learning rate schedule each. " if len(runs) > 1 else ""
    write_loss_curve(metrics, out / "loss.png")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    modules = {"transformer": model.transformer, "vae": model.vae, "text_encoder": model.text_encoder}
    parts = [
        f"| {name} | `{type(module).__name__}` | {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M |"
        for name, module in modules.items()
    ]
    card = CARD.format(
        parts="\n".join(parts),
        steps=STEPS,
        guidance=guidance,
        prompts=prompts,
        judge=judge.accuracy,
        quality="\n".join(percent_row(cell, figures) for cell, figures in quality.items()),
        tried="\n".join(percent_row(f"{row['guidance_scale']:g}", row) for row in tried),
        training=(
            f"Flow matching, {steps} steps, batch {recipe['train']['batch_size']}, {seconds / 60:.0f} minutes on "
            f"{torch.get_num_threads()} cores ({processor()}) that did other things too, no GPU. "
            f"{stages}The autoencoder was trained by `recipes/micro-vae.yaml`, `micro-vae-decoder.yaml` and "
            "`micro-vae-core.yaml`, the text encoder by `micro-text.yaml`: by contrast with latents, on training "
            "combinations only. `docs/micro.md` has the order. The last stage's recipe:"
        ),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "quality.json").write_text(json.dumps({"guidance": tried, "quality": quality}, indent=2) + "\n")
    print(card[card.index("## Quality") : card.index("## Training")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="the teacher's stages in order; the last one's model ships")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200, help="a row of the tables")
    arguments = parser.parse_args()
    ship(arguments.runs, arguments.out, arguments.prompts)


if __name__ == "__main__":
    main()
