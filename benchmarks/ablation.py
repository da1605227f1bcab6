"""The paper's study on the emoji world: what each part of Decoupled-DMD does, and baselines, at equal wall time.

Every arm distils the shipped teacher to 4 steps for the same time, with every seed, and is measured on the same
held-out prompts and seeds. What is done is kept: the same command goes on, arm by arm.

    python benchmarks/ablation.py --out runs/ablation [--minutes 2.5] [--seeds 0 1 2] [--arms hybrid shared ...]

13 arms with 3 seeds take about two hours on 2 CPU cores. The minutes are those of training. GAN, mean-variance, DMD,
DMD2 and trajectory also need what the teacher makes of some noise; that is made once, in ``<out>/cache``, for all of
them, and its time is printed, not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from fewstep import api
from fewstep.config.recipe import CacheRecipe
from fewstep.data.teacher_trajectories import make_cache
from fewstep.emoji.classifier import EmojiClassifier, correct
from fewstep.emoji.dataset import EmojiDataset
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.images import as_float
from fewstep.evaluation.runner import emoji_prompts
from fewstep.inference.generate import generate
from fewstep.inference.params import parse_params
from fewstep.models.pipeline import TextToImagePipeline, load

BASE = "micro-decoupled"
NO_DM = "shield.weight=0"
GAN = ("shield.gan=0.3", "optim.discriminator={lr: 1.0e-3, betas: [0.0, 0.99]}")

#: The recipe that ships has a cosine over its steps; so many of them fill a minute on 2 cores.
TURBO, TURBO_STEPS_A_MINUTE = "micro-turbo", 38

#: Arm -> its recipe, and what it changes there. Nothing is tuned for one arm alone.
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hybrid": (BASE, ()),
    "constrained": (BASE, ("renoise.schedule=constrained",)),
    "full": (BASE, ("renoise.schedule=full",)),
    "shared": (BASE, ("renoise.schedule=shared",)),
    "CA only": ("micro-ca", ()),
    "DM only": ("micro-dm", ()),
    "CA + mean-variance": (BASE, (NO_DM, "shield.mean_variance=0.3")),
    "CA + GAN": (BASE, (NO_DM, *GAN)),
    "DMD": ("micro-dmd", ()),
    "DMD2": ("micro-dmd2", ()),
    "CDM": ("micro-cdm", ()),
    "trajectory": (BASE, ("method=trajectory",)),
    "micro-turbo": (TURBO, ("fake_warmup=5",)),
}

#: Beyond the study, when they are asked for by name: other shields and roles.
FURTHER: dict[str, tuple[str, tuple[str, ...]]] = {
    "CA + MMD": (BASE, (NO_DM, "shield.mmd=0.3")),
    "hybrid, coarser too": (BASE, ("shield.scales={2: 0.5}",)),
    "hybrid, LoRA of rank 32": (BASE, ("roles.kind=lora", "optim.student.lr=1.5e-3", "optim.fake.lr=2.0e-3")),
}

#: Figure -> its title, its factor, and how it is written.
FIGURES = {
    "object_acc": ("object right, %", 100, ".1f"),
    "style_acc": ("style right, %", 100, ".1f"),
    "fd_teacher": ("FD to the teacher", 1, ".1f"),
    "diversity": ("diversity, ×1000", 1000, ".1f"),
    "saturation": ("saturation", 1, ".3f"),
    "hf_energy": ("hf energy, ×1000", 1000, ".3f"),
    "steps": ("steps", 1, ".0f"),
}


class Yardstick:
    """Prompts, seeds and the teacher's own images of them, to measure models by.

    Args:
        kept: folder where what the teacher did is kept.
        seeds_of: how many of the prompts are generated with four seeds, for diversity.
    """

    def __init__(self, teacher: TextToImagePipeline, count: int, kept: Path, seeds_of: int = 16) -> None:
        self.prompts = emoji_prompts(count)
        self.some = [prompt for prompt in self.prompts[:seeds_of] for _ in range(4)]
        world = EmojiDataset.load()
        self.concepts = [c for c in map(world.parse, self.prompts) if c is not None]
        self.net, self.judge = FeatureNet(), EmojiClassifier.load()
        if not (kept / "teacher.safetensors").exists():
            images = generate(teacher, self.prompts).images
            save_file({"features": self.net(images)}, kept / "teacher.safetensors")
        self.features = load_file(kept / "teacher.safetensors")["features"]
        if not (kept / "teacher.json").exists():
            few: list[tuple[str, dict[str, float]]] = [
                ("teacher, 50 steps", {}),
                ("teacher, 4 steps", {"steps": 4, "guidance_scale": 0}),
                ("teacher, 4 steps, guided", {"steps": 4}),
            ]
            found = {name: self.figures(teacher, **options) for name, options in few}
            (kept / "teacher.json").write_text(json.dumps(found, indent=1))
        self.teacher: dict[str, dict[str, float | None]] = json.loads((kept / "teacher.json").read_text())

    def figures(self, model: TextToImagePipeline, **options: float) -> dict[str, float | None]:
        params = parse_params(options)
        images = generate(model, self.prompts, params).images
        several = generate(model, self.some, params.model_copy(update={"seed": len(self.prompts)})).images
        features = self.net(images)
        pixels = as_float(images)
        right = correct(self.judge(images), self.concepts)
        return {
            **{key: float(hit.float().mean()) for key, hit in right.items()},
            "fd_teacher": measure.frechet_distance(features, self.features),
            "diversity": measure.diversity(self.net(several).unflatten(0, (-1, 4))),
            "saturation": measure.saturation(pixels),
            "hf_energy": measure.hf_energy(pixels),
        }


def run(arm: str, seed: int, yardstick: Yardstick, arguments: argparse.Namespace) -> dict[str, float | None]:
    """The figures of one arm and seed, from disk if they are there."""
    folder = arguments.out / f"{arm.replace(' ', '-')}-{seed}"
    file = folder / "figures.json"
    if file.exists():
        return json.loads(file.read_text())
    recipe, changes = (ARMS | FURTHER)[arm]
    steps = round(arguments.minutes * TURBO_STEPS_A_MINUTE) if recipe == TURBO else 100_000
    common = [f"train.max_minutes={arguments.minutes}", f"train.steps={steps}", f"train.seed={seed}"]
    common += [f"teacher={arguments.teacher}", f"trajectory.cache={arguments.out / 'cache'}", "trajectory.substeps=4"]
    quiet = ["train.sample_every=0", "evaluate.enabled=false", "evaluate.every=50"]
    made = api.distill(recipe, folder, overrides=[*common, *quiet, *changes])
    found = yardstick.figures(load(made.student))
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    found |= {"steps": json.loads(last)["step"], "max_minutes": json.loads(last)["seconds"] / 60}
    file.write_text(json.dumps(found, indent=1))
    return found


def show(found: dict[str, list[dict[str, float | None]]], teacher: dict[str, dict[str, float | None]]) -> str:
    """A Markdown table, means over seeds with their range; also printed."""
    rows = [[name, *(_cell(key, [one.get(key)]) for key in FIGURES)] for name, one in teacher.items()]
    rows += [[arm, *(_cell(key, [one[key] for one in several]) for key in FIGURES)] for arm, several in found.items()]
    columns = ["arm", *(title for title, _, _ in FIGURES.values())]
    table = Table(title="Decoupled-DMD on the emoji world, 4 steps")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(key: str, values: list[float | None]) -> str:
    _, factor, style = FIGURES[key]
    numbers = [factor * value for value in values if value is not None]
    if not numbers:
        return "–"
    mean = format(statistics.mean(numbers), style)
    return f"{mean} ({min(numbers):{style}} to {max(numbers):{style}})" if len(numbers) > 1 else mean


#: What the curves show: how many things are named, and what over-baking moves.
CURVES = {"quality/name_top1": "name right", "quality/saturation": "saturation", "quality/hf_energy": "hf energy"}


def draw_curves(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> Figure:
    """Short evaluations (64 prompts) against minutes of training, a line an arm and seed."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for index, arm in enumerate(arms):
        for seed in seeds:
            file = folder / f"{arm.replace(' ', '-')}-{seed}" / "metrics.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            for panel, (key, title) in zip(panels, CURVES.items(), strict=True):
                points = [(line["seconds"] / 60, line[key]) for line in lines if key in line]
                style = {"color": colormaps["tab20"](index % 20), "marker": ".", "linewidth": 1}
                panel.plot(*zip(*points, strict=True), label=arm if seed == seeds[0] else None, **style)
                panel.set_title(title, loc="left")
                panel.set_xlabel("minutes of training")
    for panel in panels[1:]:
        panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--minutes", type=float, default=2.5, help="of training, each arm and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS | FURTHER))
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    teacher = load(arguments.teacher)
    began = time.monotonic()
    made = {"steps": 4, "substeps": 4, "samples": 1024}
    make_cache(CacheRecipe(kind="cache", name="ablation", teacher=arguments.teacher, **made), arguments.out / "cache")
    print(f"the teacher's trajectories: {time.monotonic() - began:.0f} s")
    yardstick = Yardstick(teacher, arguments.prompts, arguments.out)
    found: dict[str, list[dict[str, float | None]]] = {}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            found.setdefault(arm, []).append(run(arm, seed, yardstick, arguments))
            (arguments.out / "table.md").write_text(show(found, yardstick.teacher))
        draw_curves(arguments.out, arguments.arms, arguments.seeds).savefig(arguments.out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
