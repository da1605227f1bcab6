"""AdvDMD beside Decoupled-DMD, DMD2 and DMDR, for students of 4, 2 and 1 steps of the emoji model, at equal time.

    python benchmarks/advdmd.py --out runs/advdmd [--steps 4 2 1] [--arms AdvDMD DMDR ...] [--seeds 0 1 2]
        [--minutes 2] [--start-minutes 2] [--plan]

All arms of a number of steps start from one student: the bundled one for 4; for 2 that of ``micro-2``, trained on from
the bundled one; for 1 that of the teacher's trajectories. They train for the same minutes of one thread's time (set
OMP_NUM_THREADS=1), in which a discriminator's own training is included. Adversarial arms have emoji images as real
samples, at 1 step the teacher's. One step has no AdvDMD: its rollout has no stochastic step.

Students are measured on test prompts; the teacher's images of the first 200 come with it.
Finished runs are kept: the same command resumes. ``<out>`` gets table.md, targets.md, figures.json, and for each number
of steps a picture of the first prompts. ``--plan`` prints the time, and stops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from ablation_results import markdown
from advdmd_arms import ARMS, STARTS, STEPS, Arm
from advdmd_results import METRICS, REAL, START, TEACHER, targets, title
from dmdr import COMMON, ENDLESS, Figures, folder_name, kept
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strip import draw_strip
from torch import Tensor

from fewstep import api
from fewstep.atomic import write_text
from fewstep.config.load import load_recipe
from fewstep.config.recipe import CacheRecipe
from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.data.teacher_trajectories import make_cache
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.scorer import EmojiScorer
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import mean_scores
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.images import as_float, as_uint8
from fewstep.evaluation.kept_images import PUBLISHED
from fewstep.evaluation.runner import DIVERSITY_PROMPTS, DIVERSITY_SEEDS
from fewstep.evaluation.settings import TEACHER_STEPS
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.components import resolve_model
from fewstep.models.pipeline import TextToImagePipeline, load

SUBSTEPS = 16  # of the teacher, in the trajectories of a 1-step student
SHOWN, LABEL_WIDTH = 8, 216  # prompts in a picture, and pixels of its labels


def timed(minutes: float, seed: int) -> list[str]:
    return [*COMMON, f"train.max_minutes={minutes}", f"train.steps={ENDLESS}", f"train.seed={seed}"]


def trajectories(recipe: str, overrides: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Overrides for the teacher's trajectories, which are sampled once; none for a recipe that needs none."""
    if not load_recipe(recipe, overrides).method.samples_teacher:
        return []
    cache = options.out / "trajectories"
    make_cache(
        CacheRecipe(
            kind="cache_trajectories",
            name="advdmd",
            teacher="micro",
            steps=1,
            teacher_steps_per_student_step=SUBSTEPS,
            num_trajectories=options.trajectories,
        ),
        cache,
    )
    return [f"trajectory={{cache: {cache}, teacher_steps_per_student_step: {SUBSTEPS}}}"]


def start(steps: int, options: argparse.Namespace) -> str:
    """The student that all arms of a number of steps start from."""
    found = STARTS[steps]
    if found.recipe is None:
        return "micro-turbo"
    folder = options.out / f"start-{steps}"
    if not (folder / "student").is_dir():
        initial = "null" if found.parent is None else start(found.parent, options)
        overrides = [*timed(found.minutes * options.start_minutes, 0), *found.overrides, f"init={initial}"]
        overrides += trajectories(found.recipe, found.overrides, options)
        api.distill(found.recipe, folder, overrides=overrides)
    return str(folder / "student")


def train(arm: Arm, steps: int, seed: int, folder: Path, options: argparse.Namespace) -> Figures:
    """Trains an arm; how many steps of training it made, and the gate's figures where it has one."""
    overrides = [f"student={{steps: {steps}}}", *arm.overrides(steps), f"init={start(steps, options)}"]
    api.distill(
        "micro-dmdr",
        folder,
        overrides=[*timed(options.minutes, seed), *overrides, *trajectories("micro-dmdr", overrides, options)],
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    aucs = [line["discriminator/auc"] for line in lines if "discriminator/auc" in line]
    gates = [
        key for key in lines[-1] if (key.startswith("student/adv") and key.endswith("_open")) or key == "surrogate/open"
    ]
    opened = [line[key] for line in lines for key in gates if key in line]
    return {
        "steps": lines[-1]["step"],
        "minutes": lines[-1]["seconds"] / 60,
        "auc": aucs[-1] if aucs else None,
        "open": sum(opened) / len(opened) if opened else None,
    }


class Evaluator:
    """Measures students beside the teacher's 50 steps and real images of the same prompts.

    Args:
        folder: keeps the features and figures of teacher and real images.
    """

    def __init__(self, teacher: TextToImagePipeline, count: int, folder: Path) -> None:
        self.prompts = list(open_prompts(PromptSettings()).texts("test")[:count])
        self.repeated = [prompt for prompt in self.prompts[:DIVERSITY_PROMPTS] for _ in range(DIVERSITY_SEEDS - 1)]
        self.network, self.scorers = open_features(), (EmojiScorer(), NearestReal())
        if not (folder / "reference.json").exists():
            sets = {
                "teacher": self.teacher_images(teacher),
                "real": self.real_images(1),
                "real again": self.real_images(2),
            }
            features = {name: self.network(images) for name, images in sets.items()}
            save_file(features, folder / "reference.safetensors")
            self.features = features
            found = {TEACHER: self.figures(sets["teacher"], features["teacher"])}
            found[REAL] = self.figures(sets["real"], features["real"])
            found[REAL]["fd_real"] = measure.frechet_distance(
                *(features[name][:count] for name in ("real", "real again"))
            )
            write_text(folder / "reference.json", json.dumps(found, indent=1))
        self.features = load_file(folder / "reference.safetensors")
        self.reference: dict[str, Figures] = json.loads((folder / "reference.json").read_text())

    def teacher_images(self, teacher: TextToImagePipeline) -> Tensor:
        """Those that come with the teacher where they are of these prompts; others are sampled."""
        folder = resolve_model("micro") / PUBLISHED
        setting = f"teacher_{TEACHER_STEPS}"
        with safe_open(folder / f"{setting}.safetensors", "pt") as file:
            if json.loads(file.metadata()["made_by"])["prompts"] == self.prompts:
                more = load_file(folder / f"{setting}-seeds.safetensors")["images"]
                return torch.cat([file.get_tensor("images"), more])
        return self.images(teacher, TEACHER_STEPS)

    def real_images(self, seed: int) -> Tensor:
        dataset, stream = EmojiDataset.load(), torch.Generator().manual_seed(seed)
        specs = [dataset.parse(prompt) for prompt in [*self.prompts, *self.repeated]]
        return as_uint8(dataset.render([spec for spec in specs if spec is not None], stream))

    def images(self, model: TextToImagePipeline, steps: int) -> Tensor:
        """Of the prompts, and further seeds of the first ones: uint8 [N + M, H, W, 3]."""
        main = generate(model, self.prompts, SamplingParams(steps=steps)).images
        more = generate(model, self.repeated, SamplingParams(steps=steps, seed=len(self.prompts))).images
        return torch.cat([main, more])

    def __call__(self, student: TextToImagePipeline, steps: int) -> dict[str, float | None]:
        images = self.images(student, steps)
        return self.figures(images, self.network(images))

    def figures(self, images: Tensor, features: Tensor) -> dict[str, float | None]:
        count = len(self.prompts)
        main, pixels = images[:count], as_float(images[:count])
        first, more = features[:DIVERSITY_PROMPTS, None], features[count:].unflatten(0, (-1, DIVERSITY_SEEDS - 1))
        scores = [mean_scores(scorer.score(main, self.prompts)) for scorer in self.scorers]
        return {
            **{key: mean for each in scores for key, mean in each.items()},
            "fd_real": measure.frechet_distance(features[:count], self.features["real"][:count]),
            "fd_teacher": measure.frechet_distance(features[:count], self.features["teacher"][:count]),
            "diversity": measure.diversity(torch.cat([first, more], dim=1)),
            "saturation": measure.saturation(pixels),
            "hf_energy": measure.hf_energy(pixels),
        }


def run_folder(name: str, steps: int, seed: int, options: argparse.Namespace) -> Path:
    found: Path = options.out / f"{folder_name(name)}-{steps}-{seed}"
    return found


def run(name: str, steps: int, seed: int, evaluator: Evaluator, options: argparse.Namespace) -> Figures:
    """The figures of one arm and seed, from disk if they are there."""
    folder = run_folder(name, steps, seed, options)

    def made() -> Figures:
        how = train(ARMS[name], steps, seed, folder, options)
        return {**evaluator(load(folder / "student"), steps), **how}

    return kept(folder.with_suffix(".json"), made)


def picture(steps: int, evaluator: Evaluator, options: argparse.Namespace) -> Path:
    """Draws the first English test prompts, with the first seed of each arm."""
    chosen = [row for row, prompt in enumerate(evaluator.prompts) if prompt.isascii()][:SHOWN]
    prompts = [evaluator.prompts[row] for row in chosen]
    folders = {START: options.out / f"start-{steps}"} if STARTS[steps].recipe is not None else {}
    folders |= {name: run_folder(name, steps, options.seeds[0], options) for name in options.arms}
    rows = {"teacher\n50 steps": evaluator.teacher_images(load("micro"))[chosen]}
    for name, folder in folders.items():
        if (folder / "student").is_dir():
            sampling = SamplingParams(steps=steps, seeds=chosen)  # the noise of the teacher's images
            images = generate(load(folder / "student"), prompts, sampling).images
            rows[f"{name}\n{steps} {'step' if steps == 1 else 'steps'}"] = images
    rows["real images\n"] = evaluator.real_images(1)[chosen]
    path = options.out / f"steps-{steps}.webp"
    draw_strip(rows, prompts, label_width=LABEL_WIDTH).save(path, quality=90)
    return path


def cost(options: argparse.Namespace) -> str:
    """What the study trains, in minutes."""
    runs = [(name, steps) for steps in options.steps for name in options.arms if steps in ARMS[name].steps]
    starts = sum(STARTS[steps].minutes for steps in options.steps if STARTS[steps].recipe is not None)
    whole = len(runs) * len(options.seeds) * options.minutes + starts * options.start_minutes
    return f"{len(runs)} arms, {len(options.seeds)} seeds: {whole:.0f} minutes of training, besides making the images"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/advdmd"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=2.0, help="of each arm, after its start")
    parser.add_argument("--start-minutes", type=float, default=2.0, help="of a start; that of 1 step has twice as many")
    parser.add_argument("--trajectories", type=int, default=768, help="of the teacher, for the students of 1 step")
    parser.add_argument("--prompts", type=int, default=200, help="test prompts")
    parser.add_argument("--plan", action="store_true", help="print the time, and stop")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    print(cost(options), flush=True)
    if options.plan:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(load("micro"), options.prompts, options.out)
    found: dict[str, list[Figures]] = {}
    for seed in options.seeds:
        for steps in options.steps:
            begun = title(START, steps)
            if begun not in found:
                student = start(steps, options)
                found[begun] = [kept(options.out / f"start-{steps}.json", partial(evaluator, load(student), steps))]
            for name in options.arms:
                if steps in ARMS[name].steps:
                    found.setdefault(title(name, steps), []).append(run(name, steps, seed, evaluator, options))
        reference = evaluator.reference
        whole = {**{name: [one] for name, one in reference.items()}, **found}
        write_text(options.out / "figures.json", json.dumps(whole, indent=1))
        write_text(options.out / "table.md", markdown(whole, METRICS, "AdvDMD, students of 4, 2 and 1 steps"))
        write_text(options.out / "targets.md", targets(found, reference))
    print(targets(found, evaluator.reference))
    for steps in options.steps:
        print(picture(steps, evaluator, options))


if __name__ == "__main__":
    main()
