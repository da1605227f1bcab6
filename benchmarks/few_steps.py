"""One student of 1, 2, 4 and 8 steps beside a student of each, and ways to train 2 steps, on the emoji dataset.

    python benchmarks/few_steps.py --out runs/few-steps [--arms "any, 4x" "8 steps" ...] [--seeds 0] [--updates 100]

All train by Decoupled-DMD, those of "trajectories" on the teacher's trajectories first, as the recipe ``micro-any``.
Students of one number of steps start from the bundled one and take ``--updates`` updates; so do the arms "any", the
"4x" ones with 4 times as many, which is what the four others take together, and "more often 1" with 6 times as many,
half of which have 1 step: that takes the same time. The ways to train 2 steps start from the teacher and take twice as
many. Each student is measured at its numbers of steps on test prompts, as in advdmd.py, whose evaluation this is.

Finished runs are kept: the same command resumes. ``<out>`` gets table.md and figures.json. Set OMP_NUM_THREADS=1 to
run two at once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ablation_results import markdown
from advdmd import Evaluator
from advdmd_results import METRICS, REAL, START, TEACHER, title
from dmdr import Figures, folder_name, kept

from fewstep import api
from fewstep.atomic import write_text
from fewstep.models.pipeline import load

COUNTS = (1, 2, 4, 8)
SHOWN = {**{key: each for key, each in METRICS.items() if key not in ("auc", "open")}, "minutes": ("minutes", 1, ".1f")}
TURBO = (
    *("method.terms.cfg_augmentation.guidance_scale=1.5", "optim.student.lr=3.0e-4", "optim.fake_score.lr=4.0e-4"),
    "train.batch_size=16",
)
LORA = ("models={train: lora, rank: 32, compile: auto}", "optim.student.lr=1.0e-3", "optim.fake_score.lr=1.2e-3")


@dataclass(frozen=True)
class Arm:
    """
    counts: numbers of steps that the student is trained for; a repeated one is trained more often.
    updates: relative to those of the others.
    recipe, base: that it is trained by, and its overrides in all arms of that recipe.
    """

    counts: tuple[int, ...]
    updates: int = 1
    init: str = "micro-turbo"
    overrides: tuple[str, ...] = ()
    recipe: str = "micro-turbo"
    base: tuple[str, ...] = TURBO


def trajectories(counts: tuple[int, ...], updates: int = 1) -> Arm:
    """On trajectories of 16 teacher steps, whose states are those of the most steps."""
    return Arm(
        counts,
        updates,
        overrides=(f"trajectory.teacher_steps_per_student_step={16 // counts[-1]}",),
        recipe="micro-any",
        base=(),
    )


ARMS = {
    **{title("one", count): Arm((count,)) for count in COUNTS},
    "any": Arm(COUNTS),
    "any, 4x": Arm(COUNTS, 4),
    **{title("one, trajectories", count): trajectories((count,)) for count in COUNTS},
    "any, trajectories, 4x": trajectories(COUNTS, 4),
    "any, trajectories, more often 1": trajectories((1, 1, 1, 1, 2, 2, 4, 8), 6),
    "full copies, 2 steps": Arm((2,), 2, "null"),
    "LoRA, 2 steps": Arm((2,), 2, "null", LORA),
    "LoRA for each step, 2 steps": Arm((2,), 2, "null", (*LORA, "models.lora_per_step=true")),
    "gradient through all steps, 2 steps": Arm((2,), 2, "null", ("method.gradient_steps=all",)),
}


def student_settings(counts: tuple[int, ...]) -> str:
    chosen = "" if len(counts) == 1 else f", step_counts: [{', '.join(map(str, counts))}]"
    return f"student={{steps: {counts[-1]}{chosen}}}"


def train(arm: Arm, seed: int, folder: Path, options: argparse.Namespace) -> Figures:
    """Trains an arm; its updates, and its minutes of a thread."""
    api.distill(
        arm.recipe,
        folder,
        overrides=[
            *("train.sample_every=0", "evaluate.enabled=false", "evaluate.validate_every=0", f"init={arm.init}"),
            *("train.clock=thread", "models.compile=auto", "train.save_every=100"),
            *(f"train.seed={seed}", f"train.steps={arm.updates * options.updates}"),
            *(*arm.base, student_settings(arm.counts), *arm.overrides),
        ],
    )
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"steps": last["step"], "minutes": last["seconds"] / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=100, help="of a student of one number of steps")
    parser.add_argument("--prompts", type=int, default=200, help="test prompts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(load("micro"), options.prompts, options.out)
    found: dict[str, list[Figures]] = {
        f"{START}, at {count}": [
            kept(options.out / f"start-{count}.json", partial(evaluator, load("micro-turbo"), count))
        ]
        for count in sorted({count for name in options.arms for count in ARMS[name].counts})
    }
    for seed in options.seeds:
        for name in options.arms:
            folder = options.out / f"{folder_name(name)}-{seed}"
            how = kept(folder.with_suffix(".json"), partial(train, ARMS[name], seed, folder, options))
            for count in sorted(set(ARMS[name].counts)):
                figures = kept(
                    options.out / f"{folder.name}-at-{count}.json",
                    partial(evaluator, load(folder / "student"), count),
                )
                row = name if len(ARMS[name].counts) == 1 else f"{name}, at {count}"
                found.setdefault(row, []).append({**figures, **how})
        reference = evaluator.reference
        whole = {TEACHER: [reference[TEACHER]], REAL: [reference[REAL]], **found}
        write_text(options.out / "figures.json", json.dumps(whole, indent=1))
        write_text(options.out / "table.md", markdown(whole, SHOWN, "One student of several numbers of steps"))


if __name__ == "__main__":
    main()
