"""The paper's study on the emoji world: what each part of Decoupled-DMD does, and baselines, at equal wall time.

Every arm distils the shipped teacher to 4 steps for the same time, with every seed, and is measured on the same
held-out prompts and seeds. What is done is kept: the same command goes on, arm by arm.

    python benchmarks/ablation.py --out runs/ablation [--minutes 2.5] [--seeds 0 1 2] [--arms hybrid shared ...]

The minutes are those of training. GAN, MMD, mean-variance, DMD, DMD2 and trajectory also need what the teacher makes of
some noise; that is made once, in ``<out>/cache``, for all of them, and its time is printed, not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep import api
from fewstep.data.emoji import EmojiWorld
from fewstep.distill.caching import make_cache
from fewstep.evaluate import metrics as measure
from fewstep.evaluate.evaluate import emoji_prompts
from fewstep.evaluate.features import FeatureNet
from fewstep.evaluate.images import as_float
from fewstep.evaluate.judge import Judge, hits
from fewstep.generate import generate
from fewstep.models.pipeline import TextToImage, load
from fewstep.recipes.load import load_recipe
from fewstep.recipes.schema import CacheRecipe

GAN = ("shield.gan=0.3", "optim.discriminator={lr: 1.0e-3, betas: [0.0, 0.99]}")

#: What makes recipes/micro-turbo.yaml the paper's algorithm, from the first step on.
PLAIN = (
    *("align=0", "fake_warmup=0", "shield.regression=0"),
    "optim.student={lr: 2.0e-4, betas: [0.0, 0.99], warmup_steps: 20, ema: 0.98}",
)

#: Arm -> what it changes in that. Nothing is tuned for one arm alone.
ARMS: dict[str, tuple[str, ...]] = {
    "hybrid": (),
    "constrained": ("renoise.schedule=constrained",),
    "full": ("renoise.schedule=full",),
    "shared": ("renoise.schedule=shared",),
    "CA only": ("shield.enabled=false",),
    "DM only": ("spear.enabled=false",),
    "CA + mean-variance": ("shield.weight=0", "shield.mean_variance=0.3"),
    "CA + GAN": ("shield.weight=0", *GAN),
    "CA + MMD": ("shield.weight=0", "shield.mmd=0.3"),
    "DMD": ("renoise.schedule=shared", "fake_updates=1", "shield.regression=1"),
    "DMD2": ("renoise.schedule=shared", "fake_updates=5", *GAN),
    "trajectory": ("method=trajectory",),
    "hybrid + regression": ("shield.regression=6",),
}

FIGURES = ("name_top1", "style_top1", "fd_teacher", "diversity", "saturation", "hf_energy")


class Yardstick:
    """Prompts, seeds and the teacher's own images of them, to measure models by.

    Args:
        seeds_of: how many of the prompts are generated with four seeds, for diversity.
    """

    def __init__(self, teacher: TextToImage, count: int, seeds_of: int = 16) -> None:
        self.prompts = emoji_prompts(count)
        self.some = [prompt for prompt in self.prompts[:seeds_of] for _ in range(4)]
        world = EmojiWorld.load()
        self.concepts = [c for c in map(world.parse, self.prompts) if c is not None]
        self.net, self.judge = FeatureNet(), Judge.load()
        self.features: Tensor | None = None
        self.teacher = self.figures(teacher)

    def figures(self, model: TextToImage, **options: float) -> dict[str, float | None]:
        images = generate(model, self.prompts, seed=0, **options).images
        several = generate(model, self.some, seed=len(self.prompts), **options).images
        features = self.net(images)
        if self.features is None:
            self.features = features  # the teacher's, which comes first
        pixels = as_float(images)
        right = hits(self.judge(images), self.concepts)
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
    common = [f"train.minutes={arguments.minutes}", "train.steps=100000", f"train.seed={seed}", "train.preview_every=0"]
    common += [*PLAIN, f"trajectory.cache={arguments.out / 'cache'}"]
    overrides = [*common, "evaluate.enabled=false", "evaluate.every=50", f"teacher={arguments.teacher}", *ARMS[arm]]
    made = api.distill("micro-turbo", folder, overrides=overrides)
    found = yardstick.figures(load(made.student))
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    found["steps"] = json.loads(last)["step"]
    file.write_text(json.dumps(found, indent=1))
    return found


def show(found: dict[str, list[dict[str, float | None]]], teacher: dict[str, float | None]) -> str:
    """A Markdown table, means over seeds with their range; also printed."""
    columns = ("arm", *FIGURES, "steps")
    rows = [["teacher", *(f"{teacher[key]:.4g}" for key in FIGURES), ""]]
    for arm, several in found.items():
        cells = []
        for key in (*FIGURES, "steps"):
            values = [float(one[key] or 0) for one in several]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}")
        rows.append([arm, *cells])
    table = Table(title="Decoupled-DMD on the emoji world, 4 steps")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--minutes", type=float, default=2.5, help="of training, each arm and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    teacher = load(arguments.teacher)
    began = time.monotonic()
    made = {"steps": 4, "substeps": load_recipe("micro-turbo").trajectory.substeps, "samples": 1024}
    make_cache(CacheRecipe(kind="cache", name="ablation", teacher=arguments.teacher, **made), arguments.out / "cache")
    print(f"the teacher's trajectories: {time.monotonic() - began:.0f} s")
    yardstick = Yardstick(teacher, arguments.prompts)
    found: dict[str, list[dict[str, float | None]]] = {}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            found.setdefault(arm, []).append(run(arm, seed, yardstick, arguments))
            (arguments.out / "table.md").write_text(show(found, yardstick.teacher))


if __name__ == "__main__":
    main()
