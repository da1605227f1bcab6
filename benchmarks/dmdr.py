"""DMDR on the emoji dataset: distillation and rewards apart, one after the other, and joined, at equal wall time.

    python benchmarks/dmdr.py --out runs/dmdr [--arms "joint, endpoint" DPO ...] [--seeds 0 1 2] [--minutes 5]
        [--cold-minutes 5] [--tune] [--plan]

Each student is distilled from the bundled teacher to 4 steps for the cold start's minutes (micro-turbo at a constant
rate), then trained for the arm's minutes from there (micro-dmdr); an arm without a cold start has the minutes of both.
A cold start is made once for each seed and shared by its arms. ``--plan`` prints the time, and stops.

``--tune`` first compares three learning rates for each arm, on validation prompts, in runs of ``--tune-minutes`` from
the first seed's cold start; the highest mean of object accuracy and nearest real wins. Students are measured on test
prompts; the reward they are trained on is measured too, and no target depends on it.

Finished runs are kept: the same command resumes. ``<out>`` gets tuning.md, table.md, targets.md, figures.json and
reward.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ablation
import torch
from dmdr_arms import ARMS, COLD_STARTS, FACTORS, Arm
from dmdr_results import best_rate, draw, table, targets, tuning_table

from fewstep import api
from fewstep.atomic import write_text
from fewstep.config.sections import PromptSettings
from fewstep.data.prompts import open_prompts
from fewstep.emoji.dataset import EmojiDataset
from fewstep.evaluation.images import as_uint8
from fewstep.evaluation.validation import Validator
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.rewards.open import open_reward
from fewstep.rewards.scorers import RewardScorer

Figures = dict[str, float | None]

ENDLESS = 100_000  # steps; the minutes end a run
COMMON = (
    *("train.sample_every=0", "evaluate.enabled=false", "evaluate.validate_every=0", "train.keep_best=null"),
    # minutes of a thread's own time, so that arms can be compared when two runs share a machine
    *("train.clock=thread", "models.compile=auto"),
)


def folder_name(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "-")


def cold_start(name: str, seed: int, options: argparse.Namespace) -> Path:
    """The student of a cold start; made once for each seed."""
    folder = options.out / "cold" / f"{name}-{seed}"
    if (folder / "student").is_dir():
        return folder / "student"
    changes = [each.replace("STEPS", str(options.schedule_steps)) for each in COLD_STARTS[name]]
    common = [
        *(*COMMON, "optim.student.lr_schedule=constant", "optim.student.min_lr_ratio=0"),
        *(f"train.max_minutes={options.cold_minutes}", f"train.steps={ENDLESS}", f"train.seed={seed}"),
    ]
    return api.distill("micro-turbo", folder, overrides=[*common, *changes]).student


def train(arm: Arm, folder: Path, lr: float, minutes: float, seed: int, options: argparse.Namespace) -> Path:
    """The student of an arm."""
    start = "null" if arm.cold_start is None else str(cold_start(arm.cold_start, seed, options))
    whole = minutes if arm.cold_start is not None else minutes + options.cold_minutes
    common = [*COMMON, f"train.max_minutes={whole}", f"train.steps={ENDLESS}", f"train.seed={seed}"]
    overrides = [*common, *arm.overrides, f"init={start}", f"optim.student.lr={lr}"]
    return api.distill("micro-dmdr", folder, overrides=overrides).student


def kept(file: Path, make: Any) -> Any:
    """What a file of JSON holds; made and written where there is none."""
    if not file.exists():
        write_text(file, json.dumps(make(), indent=1))
    return json.loads(file.read_text())


def tune(name: str, teacher: TextToImagePipeline, options: argparse.Namespace) -> dict[float, dict[str, float]]:
    """The metrics of an arm's students on validation prompts, by learning rate."""
    arm, found = ARMS[name], {}
    prompts = open_prompts(PromptSettings()).texts("validation")[: options.validation_prompts]
    validator = Validator(prompts, ["emoji", "nearest_real"])

    def measure(folder: Path, lr: float) -> dict[str, float]:
        student = train(arm, folder, lr, options.tune_minutes, options.seeds[0], options)
        return validator(load(student), teacher)()

    for factor in FACTORS:
        lr = float(f"{factor * arm.lr:.2g}")
        folder = options.out / "tune" / f"{folder_name(name)}-{lr:g}"
        found[lr] = kept(folder.parent / f"{folder.name}.json", partial(measure, folder, lr))
    return found


def run(name: str, seed: int, lr: float, evaluator: ablation.Evaluator, options: argparse.Namespace) -> Figures:
    """The figures of one arm and seed, from disk if they are there."""
    folder = options.out / f"{folder_name(name)}-{seed}"

    def measure() -> Figures:
        student = train(ARMS[name], folder, lr, options.minutes, seed, options)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        how = {"steps": last["step"], "minutes": last["seconds"] / 60, "lr": lr}
        return evaluator.measure(load(student)) | how

    return kept(folder.with_suffix(".json"), measure)


def real_images(evaluator: ablation.Evaluator, teacher: TextToImagePipeline) -> dict[str, Figures]:
    """Figures of real images of the test prompts, and of the same after the autoencoder, which bounds every student."""
    dataset, stream = EmojiDataset.load(), torch.Generator().manual_seed(0)
    specs = [[dataset.parse(prompt) for prompt in prompts] for prompts in (evaluator.prompts, evaluator.repeated)]
    found: dict[str, Figures] = {}
    images = [dataset.render([spec for spec in each if spec is not None], stream) for each in specs]
    found["real images"] = evaluator.figures(*(as_uint8(each) for each in images))
    decoded = [torch.cat([teacher.decode(teacher.encode_images(part)) for part in each.split(64)]) for each in images]
    found["real, autoencoder"] = evaluator.figures(*(as_uint8(each) for each in decoded))
    return found


def cost(options: argparse.Namespace) -> str:
    """What the study trains, in hours."""
    arms, seeds = [ARMS[name] for name in options.arms], len(options.seeds)
    starts = {arm.cold_start for arm in arms if arm.cold_start is not None}
    from_teacher = sum(arm.cold_start is None for arm in arms)
    whole = seeds * (len(arms) * options.minutes + (len(starts) + from_teacher) * options.cold_minutes)
    tuning = len(FACTORS) * (len(arms) * options.tune_minutes + from_teacher * options.cold_minutes)
    lines = [
        f"{len(arms)} arms, {seeds} seeds: {whole / 60:.1f} h of training ({options.minutes:g} min an arm after "
        f"{options.cold_minutes:g} min of cold start, {len(starts)} cold starts a seed)"
    ]
    if options.tune:
        lines.append(f"tuning before it: {len(FACTORS)} learning rates an arm, {tuning / 60:.1f} h of training")
    lines.append(f"besides, each student's {options.prompts + 64} images are made and measured, and the teacher's once")
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dmdr"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=5.0, help="of each arm, after its cold start")
    parser.add_argument("--cold-minutes", type=float, default=5.0)
    parser.add_argument("--schedule-steps", type=int, default=100, help="of DynaRS and DynaDG in a cold start")
    parser.add_argument("--prompts", type=int, default=500, help="test prompts")
    parser.add_argument("--tune", action="store_true", help="compare three learning rates for each arm first")
    parser.add_argument("--tune-minutes", type=float, default=2.5, help="of each run of the tuning")
    parser.add_argument("--validation-prompts", type=int, default=128, help="of the tuning")
    parser.add_argument("--plan", action="store_true", help="print the time, and stop")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    print(cost(options), flush=True)
    if options.plan:
        return
    teacher = load("micro")
    reward = RewardScorer(open_reward("emoji"))
    options.out.mkdir(parents=True, exist_ok=True)
    evaluator = ablation.Evaluator(teacher, options.prompts, options.out, further=[reward])
    reference = evaluator.teacher | kept(options.out / "real.json", lambda: real_images(evaluator, teacher))
    rates = {name: ARMS[name].lr for name in options.arms}
    if options.tune:
        tried = {name: tune(name, teacher, options) for name in options.arms}
        rates = {name: best_rate(found) for name, found in tried.items()}
        write_text(options.out / "tuning.md", tuning_table(tried))
    found: dict[str, list[Figures]] = {}
    for seed in options.seeds:
        for name in options.arms:
            found.setdefault(name, []).append(run(name, seed, rates[name], evaluator, options))
            write_text(options.out / "figures.json", json.dumps({"reference": reference, "arms": found}, indent=1))
            write_text(options.out / "table.md", table(found, reference))
        write_text(options.out / "targets.md", targets(found, reference))
        draw(found, reference).savefig(options.out / "reward.png", dpi=110)
    print(targets(found, reference))


if __name__ == "__main__":
    main()
