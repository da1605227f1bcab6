"""The paper's ablation on the emoji dataset: each part of Decoupled-DMD, and baselines, at equal wall time.

Every variant distills the bundled teacher to 4 steps for the same time, with every seed, and is measured on the same
test prompts and seeds. Finished runs are kept: the same command resumes, variant by variant.

    python benchmarks/ablation.py --out runs/ablation [--minutes 2.5] [--seeds 0 1 2] [--variants hybrid shared ...]
    python benchmarks/ablation.py --out runs/ablation --tuned runs/tune [--length 10]

The minutes are those of training; 13 variants with 3 seeds take about two hours on 2 CPU cores. With ``--tuned`` every
variant has the settings of its best trial in benchmarks/tune.py, and as many steps as a whole trial computes in its
minutes; ``--length`` multiplies the minutes, or these steps. GAN, mean-variance, DMD, DMD2, trajectory and
micro-aligned also need the teacher's trajectories. These are computed once, in ``<out>/cache`` (that of the tuning,
where there is one), for all variants; their time is printed, not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from ablation_results import arm_folder, draw_curves, run_folder, show
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep import api
from fewstep.config.load import load_recipe
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


def settings(variant: str, arguments: argparse.Namespace) -> tuple[str | Path, list[str]]:
    """The recipe of a variant, and overrides."""
    if arguments.tuned is not None:
        best = arm_folder(arguments.tuned, variant) / "best.yaml"
        return best, [f"train.steps={round(load_recipe(best).train.steps * arguments.length)}"]
    recipe, changes = (VARIANTS | FURTHER)[variant]
    minutes = arguments.minutes * arguments.length
    steps = max(1, round(minutes * TURBO_STEPS_PER_MINUTE)) if recipe == TURBO else 100_000
    own = [f"train.max_minutes={minutes}", f"train.steps={steps}"]
    return recipe, [*own, *cached(recipe, changes, arguments.out / "cache"), *changes]


def run(variant: str, seed: int, evaluator: Evaluator, arguments: argparse.Namespace) -> dict[str, float | None]:
    """The metrics of one variant and seed, from disk if they are there."""
    folder = run_folder(arguments.out, variant, seed)
    file = folder / "figures.json"
    if file.exists():
        return json.loads(file.read_text())
    recipe, overrides = settings(variant, arguments)
    common = [
        *(f"train.seed={seed}", f"teacher={arguments.teacher}", "train.sample_every=0", "evaluate.enabled=false"),
        *("evaluate.validate_every=50", "evaluate.validation_prompts=64"),
    ]
    made = api.distill(recipe, folder, overrides=[*common, *overrides])
    found = evaluator.measure(load(made.student))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found |= {"steps": last["step"], "minutes": last["seconds"] / 60}
    file.write_text(json.dumps(found, indent=1))
    return found


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


def cached(recipe: str, changes: Sequence[str], folder: Path) -> list[str]:
    """Overrides for the trajectories in a folder; none for a recipe that needs no trajectories."""
    if not load_recipe(recipe, changes).method.samples_teacher:
        return []
    return [f"trajectory.cache={folder}", f"trajectory.teacher_steps_per_student_step={SUBSTEPS}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--minutes", type=float, default=2.5, help="of training, for each variant and seed")
    parser.add_argument(
        "--tuned", type=Path, help="folder of benchmarks/tune.py; the settings are those of its best trials"
    )
    parser.add_argument("--length", type=float, default=1.0, help="times the minutes, or a whole trial's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS | FURTHER), metavar="VARIANT"
    )
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    teacher = load(arguments.teacher)
    if arguments.tuned is None:
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
