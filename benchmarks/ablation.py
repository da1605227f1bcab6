"""The paper's ablation on the emoji dataset: each part of Decoupled-DMD, and baselines, at equal wall time.

Every variant distills the bundled teacher to 4 steps for the same time, with every seed, and is measured on the same
test prompts and seeds. Finished runs are kept: the same command resumes, variant by variant.

    python benchmarks/ablation.py --out runs/ablation [--minutes 2.5] [--seeds 0 1 2] [--variants hybrid shared ...]

13 variants with 3 seeds take about two hours on 2 CPU cores. The minutes are those of training. GAN, mean-variance,
DMD, DMD2, trajectory and micro-aligned also need the teacher's trajectories. These are computed once, in
``<out>/cache``, for all variants; their time is printed, not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import api
from fewstep.config.recipe import CacheRecipe
from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.data.teacher_trajectories import make_cache
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.scorer import EmojiScorer
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import mean_scores
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.images import as_float
from fewstep.inference.generate import generate
from fewstep.inference.params import parse_params
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.rewards.protocol import Scorer

BASE = "micro-decoupled"
NO_FAKE_SCORE = "optim.fake_score=null"
NO_DM = ("method.terms.distribution_matching=null", NO_FAKE_SCORE)
GAN = ("method.terms.gan={weight: 0.3}", "optim.discriminator={lr: 1.0e-3, betas: [0.0, 0.99]}")
LORA = ("models.train=lora", "optim.student.lr=1.5e-3", "optim.fake_score.lr=2.0e-3")

#: The bundled recipe has a cosine schedule over its steps; so many of them fill a minute on 2 cores.
TURBO, TURBO_STEPS_PER_MINUTE = "micro-aligned", 38

#: Teacher steps per student step, and number, of the cached trajectories.
SUBSTEPS, NUM_TRAJECTORIES = 4, 1024

#: Variant -> its recipe, and the overrides. Nothing is tuned for one variant alone.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hybrid": (BASE, ()),
    "constrained": (BASE, ("method.renoise.schedule=constrained",)),
    "full": (BASE, ("method.renoise.schedule=full",)),
    "shared": (BASE, ("method.renoise.schedule=shared",)),
    "CA only": ("micro-ca", ()),
    "DM only": ("micro-dm", ()),
    "CA + mean-variance": (BASE, (*NO_DM, "method.terms.mean_variance={weight: 0.3}")),
    "CA + GAN": (BASE, (*NO_DM, *GAN)),
    "DMD": ("micro-dmd", ()),
    "DMD2": ("micro-dmd2", ()),
    "CDM": ("micro-cdm", ()),
    "trajectory": (BASE, ("method={name: trajectory}", NO_FAKE_SCORE)),
    # 5 of the 95 steps that it has in 2.5 minutes before DM starts
    "micro-aligned": (TURBO, ("method.fake_score_start=80%",)),
}

#: Variants beyond the paper's study; --variants selects them.
FURTHER: dict[str, tuple[str, tuple[str, ...]]] = {
    "CA + MMD": (BASE, (*NO_DM, "method.terms.mmd={weight: 0.3}")),
    "hybrid, coarser too": (BASE, ("method.terms.distribution_matching.scales={2: 0.5}",)),
    "hybrid, LoRA of rank 32": (BASE, LORA),
}

#: Metric -> its title, its factor, and its format.
METRICS = {
    "object_acc": ("object accuracy, %", 100, ".1f"),
    "nearest_real_acc": ("nearest real, %", 100, ".1f"),
    "style_acc": ("style accuracy, %", 100, ".1f"),
    "fd_teacher": ("FD to the teacher", 1, ".1f"),
    "diversity": ("diversity, ×1000", 1000, ".1f"),
    "saturation": ("saturation", 1, ".3f"),
    "hf_energy": ("hf energy, ×1000", 1000, ".3f"),
    "steps": ("steps", 1, ".0f"),
}


class Evaluator:
    """Measures models on fixed prompts and seeds, beside the teacher's own images of them.

    Args:
        count: number of test prompts.
        folder: keeps the teacher's features and metrics.
        diversity_prompts: how many of the prompts are generated with four seeds, for diversity.
        further: scorers besides the classifier and the nearest real emoji.
    """

    def __init__(
        self,
        teacher: TextToImagePipeline,
        count: int,
        folder: Path,
        diversity_prompts: int = 16,
        further: Sequence[Scorer] = (),
    ) -> None:
        self.prompts = list(open_prompts(PromptSettings()).texts("test")[:count])
        self.repeated = [prompt for prompt in self.prompts[:diversity_prompts] for _ in range(4)]
        self.network, self.scorers = open_features(), (EmojiScorer(), NearestReal(), *further)
        if not (folder / "teacher.json").exists():
            images, seeds = self.images(teacher)
            self.features = self.network(images)
            save_file({"features": self.features}, folder / "teacher.safetensors")
            found = {
                "teacher, 50 steps": self.figures(images, seeds),
                "teacher, 4 steps": self.measure(teacher, steps=4, guidance_scale=0),
                "teacher, 4 steps, guided": self.measure(teacher, steps=4),
            }
            (folder / "teacher.json").write_text(json.dumps(found, indent=1))
        self.features = load_file(folder / "teacher.safetensors")["features"]
        self.teacher: dict[str, dict[str, float | None]] = json.loads((folder / "teacher.json").read_text())

    def measure(self, model: TextToImagePipeline, **options: float) -> dict[str, float | None]:
        """The metrics of a model's images, which are sampled with ``options``."""
        return self.figures(*self.images(model, **options))

    def images(self, model: TextToImagePipeline, **options: float) -> tuple[Tensor, Tensor]:
        """Images of the prompts, and of the repeated prompts: uint8 [N, H, W, 3]."""
        params = parse_params(options)
        images = generate(model, self.prompts, params).images
        return images, generate(model, self.repeated, params.model_copy(update={"seed": len(self.prompts)})).images

    def figures(self, images: Tensor, seeds: Tensor) -> dict[str, float | None]:
        """The metrics of images: uint8 [N, H, W, 3] of the prompts, and of the repeated prompts."""
        features = self.network(images)
        pixels = as_float(images)
        return {
            **{
                key: mean
                for scorer in self.scorers
                for key, mean in mean_scores(scorer.score(images, self.prompts)).items()
            },
            "fd_teacher": measure.frechet_distance(features, self.features),
            "diversity": measure.diversity(self.network(seeds).unflatten(0, (-1, 4))),
            "saturation": measure.saturation(pixels),
            "hf_energy": measure.hf_energy(pixels),
        }


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(' ', '-')}-{seed}"


def run(variant: str, seed: int, evaluator: Evaluator, arguments: argparse.Namespace) -> dict[str, float | None]:
    """The metrics of one variant and seed, from disk if they are there."""
    folder = run_folder(arguments.out, variant, seed)
    file = folder / "figures.json"
    if file.exists():
        return json.loads(file.read_text())
    recipe, changes = (VARIANTS | FURTHER)[variant]
    steps = max(1, round(arguments.minutes * TURBO_STEPS_PER_MINUTE)) if recipe == TURBO else 100_000
    common = [
        *(f"train.max_minutes={arguments.minutes}", f"train.steps={steps}", f"train.seed={seed}"),
        *(f"teacher={arguments.teacher}", f"trajectory.cache={arguments.out / 'cache'}"),
        *(f"trajectory.teacher_steps_per_student_step={SUBSTEPS}", "train.sample_every=0"),
        *("evaluate.enabled=false", "evaluate.validate_every=50"),
    ]
    made = api.distill(recipe, folder, overrides=[*common, *changes])
    found = evaluator.measure(load(made.student))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found |= {"steps": last["step"], "minutes": last["seconds"] / 60}
    file.write_text(json.dumps(found, indent=1))
    return found


def show(found: dict[str, list[dict[str, float | None]]], teacher: dict[str, dict[str, float | None]]) -> str:
    """A Markdown table of means over seeds with their range; also printed."""
    rows = {**{name: [one] for name, one in teacher.items()}, **found}
    return markdown(rows, METRICS, "Decoupled-DMD on the emoji dataset, 4 steps")


def markdown(
    found: Mapping[str, Sequence[Mapping[str, float | None]]],
    metrics: Mapping[str, tuple[str, float, str]],
    title: str,
) -> str:
    """A Markdown table, a row for each variant: of each metric the mean over seeds with its range; also printed.

    Args:
        metrics: key -> its title, its factor, and its format.
    """
    rows = [
        [name, *(_cell([one.get(key) for one in seeds], factor, style) for key, (_, factor, style) in metrics.items())]
        for name, seeds in found.items()
    ]
    columns = ["variant", *(each for each, _, _ in metrics.values())]
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(values: Sequence[float | None], factor: float, style: str) -> str:
    numbers = [factor * value for value in values if value is not None]
    if not numbers:
        return "–"
    mean = format(statistics.mean(numbers), style)
    return f"{mean} ({min(numbers):{style}} to {max(numbers):{style}})" if len(numbers) > 1 else mean


#: The curves: object accuracy, and the two metrics that rise with overbaking.
CURVES = {"val/object_acc": "object accuracy", "val/saturation": "saturation", "val/hf_energy": "hf energy"}


def draw_curves(folder: Path, variants: Sequence[str], seeds: Sequence[int]) -> Figure:
    """Validation metrics (64 prompts) against minutes of training, one line for each variant and seed."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for index, variant in enumerate(variants):
        for seed in seeds:
            file = run_folder(folder, variant, seed) / "metrics.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            for panel, (key, title) in zip(panels, CURVES.items(), strict=True):
                points = [(line["seconds"] / 60, line[key]) for line in lines if key in line]
                style = {"color": colormaps["tab20"](index % 20), "marker": ".", "linewidth": 1}
                panel.plot(*zip(*points, strict=True), label=variant if seed == seeds[0] else None, **style)
                panel.set_title(title, loc="left")
                panel.set_xlabel("minutes of training")
    for panel in panels[1:]:
        panel.set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def cache_trajectories(teacher: str, folder: Path) -> None:
    """Sample the teacher's trajectories that all variants share, unless they are there."""
    recipe = CacheRecipe(
        kind="cache_trajectories",
        name="ablation",
        teacher=teacher,
        steps=4,
        teacher_steps_per_student_step=SUBSTEPS,
        num_trajectories=NUM_TRAJECTORIES,
    )
    make_cache(recipe, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--minutes", type=float, default=2.5, help="of training, for each variant and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS | FURTHER))
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    teacher = load(arguments.teacher)
    start = time.monotonic()
    cache_trajectories(arguments.teacher, arguments.out / "cache")
    print(f"the teacher's trajectories: {time.monotonic() - start:.0f} s")
    evaluator = Evaluator(teacher, arguments.prompts, arguments.out)
    found: dict[str, list[dict[str, float | None]]] = {}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            found.setdefault(variant, []).append(run(variant, seed, evaluator, arguments))
            (arguments.out / "table.md").write_text(show(found, evaluator.teacher))
        draw_curves(arguments.out, arguments.variants, arguments.seeds).savefig(arguments.out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
