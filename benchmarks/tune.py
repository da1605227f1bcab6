"""An equal budget of tuning for each distillation method, in full and LoRA form, on the bundled teacher.

Every arm is a search of `fewstep tune` in its own space (benchmarks/spaces) with the same number of trials, and the
same minutes of training in each whole trial. Trials are compared on validation prompts alone. The same command resumes,
arm by arm; an arm with all its trials is not searched again.

    python benchmarks/tune.py --out runs/tune [--arms hybrid hybrid-lora ...] [--trials 24] [--trial-minutes 3]

The cost is printed before the work starts. On a CPU a trial's steps follow from the time that its thread computes, so
that other work on the machine makes the searches longer, not the trials shorter. The teacher's trajectories, which DMD,
DMD2 and trajectory need, are made once, in ``<out>/cache``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from ablation import SUBSTEPS, cache_trajectories
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fewstep.training.tracking import read_metrics
from fewstep.tuning.budget import rung_shares
from fewstep.tuning.results import length, ranked, short_names
from fewstep.tuning.space import read_space
from fewstep.tuning.study import importances
from fewstep.tuning.tune import TuneResult, tune

SPACES = Path(__file__).parent / "spaces"
LORA = ("models.train=lora", "models.rank=32")

#: Arm -> its recipe, and the overrides. Its space is benchmarks/spaces/<arm>.yaml.
FULL: dict[str, tuple[str, tuple[str, ...]]] = {
    "hybrid": ("micro-decoupled", ()),
    "dmd": ("micro-dmd", ()),
    "dmd2": ("micro-dmd2", ()),
    "cdm": ("micro-cdm", ()),
    "trajectory": ("micro-decoupled", ("method={name: trajectory}", "optim.fake_score=null")),
}
ARMS = FULL | {f"{arm}-lora": (recipe, (*changes, *LORA)) for arm, (recipe, changes) in FULL.items()}
WITH_TRAJECTORIES = ("dmd", "dmd2", "trajectory")

#: Validation metrics of the best trial in the table.
SHOWN = {"object_acc": "{:.1%}", "nearest_real_acc": "{:.1%}", "fd_teacher[open-nsfw]": "{:.1f}", "hf_energy": "{:.5f}"}


def run_arm(arm: str, arguments: argparse.Namespace) -> TuneResult:
    """Search an arm, or continue, or read what is there."""
    recipe, changes = ARMS[arm]
    common = [
        *(f"teacher={arguments.teacher}", f"evaluate.validation_prompts={arguments.prompts}"),
        *("train.log_every=10", f"train.precision={arguments.precision}", *changes),
    ]
    if arm.removesuffix("-lora") in WITH_TRAJECTORIES:
        common += [f"trajectory.cache={arguments.out / 'cache'}"]
        common += [f"trajectory.teacher_steps_per_student_step={SUBSTEPS}"]
    return tune(
        recipe,
        SPACES / f"{arm}.yaml",
        minutes=arguments.minutes,
        out=arguments.out / arm,
        trials=arguments.trials,
        trial_minutes=arguments.trial_minutes,
        metric=arguments.metric,
        overrides=common,
    )


def cost(arguments: argparse.Namespace) -> str:
    """What the searches cost if one trial in three passes each rung."""
    shares = rung_shares(3)
    mean = shares[0] + (shares[1] - shares[0]) / 3 + (shares[2] - shares[1]) / 9
    training = len(arguments.arms) * arguments.trials * arguments.trial_minutes * mean
    return (
        f"{len(arguments.arms)} arms, each {arguments.trials} trials of up to {arguments.trial_minutes:g} minutes: "
        f"about {training / 60:.1f} hours of training on an idle machine, and the measuring of {arguments.prompts} "
        f"validation prompts once to three times a trial; at most {arguments.minutes / 60:.1f} hours for an arm"
    )


def figures(found: TuneResult) -> dict[str, float]:
    """All validation metrics of the best trial at its last rung."""
    if found.best is None:
        return {}
    lines = read_metrics(found.folder / "trials" / f"{found.best.number:04d}" / "metrics.jsonl")
    last = next(line for line in reversed(lines) if found.search.objective.key in line)
    return {key.removeprefix("val/"): value for key, value in last.items() if key.startswith("val/")}


def show(found: dict[str, TuneResult]) -> str:
    """A Markdown table of the best trial of each arm; also printed."""
    columns = ["arm", "trials", "whole", "min", "best trial", "length", *SHOWN, "its values"]
    rows = []
    for arm, result in found.items():
        measured, rungs = figures(result), result.search.rungs
        best = result.best
        whole = sum(len(row.scores) == rungs for row in result.rows)
        names = short_names(result.search.space.keys)
        values = {} if best is None else best.values
        rows.append(
            [
                *(arm, str(len(result.rows)), str(whole), f"{sum(row.minutes for row in result.rows):.0f}"),
                *(("–", "–") if best is None else (str(best.number), length(best, rungs))),
                *(style.format(measured[key]) if key in measured else "–" for key, style in SHOWN.items()),
                ", ".join(f"{names[key]} {json.dumps(value)}" for key, value in values.items()),
            ]
        )
    table = Table(title="Best trials on validation prompts, an equal budget for each arm")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(found: dict[str, TuneResult]) -> Figure:
    """Left, the last score of every trial by arm; right, what mattered: each key's importance by arm."""
    figure = Figure(figsize=(14, 1.6 + 0.45 * len(found)), layout="constrained")
    scores, matters = figure.subplots(1, 2, width_ratios=(1, 1.3))
    keys = list(dict.fromkeys(key for result in found.values() for key in result.search.space.keys))
    shares = {
        arm: importances(result.rows, result.search.space, result.search.objective) for arm, result in found.items()
    }
    for place, result in enumerate(found.values()):
        for row in ranked(result.rows, result.search.objective):
            whole = len(row.scores) == result.search.rungs
            scores.plot(row.scores[-1], place, "o", color="C0" if whole else "0.75", markersize=6 if whole else 4)
        scores.set_xlabel(f"{result.search.objective.metric}, validation (gray: stopped early)")
    scores.set_yticks(range(len(found)), list(found))
    scores.invert_yaxis()
    grid = [[shares[arm].get(key, float("nan")) for key in keys] for arm in found]
    matters.imshow(grid, aspect="auto", cmap=matplotlib.colormaps["Blues"], vmin=0, vmax=1)
    matters.set_xticks(range(len(keys)), list(short_names(keys).values()), rotation=30, ha="right")
    matters.set_yticks(range(len(found)), list(found))
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:
                color = "white" if value > 0.6 else "black"
                matters.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color)
    matters.set_title("share of the importance for the first rung's score, %", loc="left", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--trials", type=int, default=24, help="of each arm")
    parser.add_argument("--trial-minutes", type=float, default=3.0, help="of training in a whole trial")
    parser.add_argument("--minutes", type=float, default=180.0, help="at most so many for each arm")
    parser.add_argument("--metric", default="fd_teacher")
    parser.add_argument("--prompts", type=int, default=128, help="validation prompts")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--plan", action="store_true", help="print the cost, and stop")
    arguments = parser.parse_args()
    print(cost(arguments), flush=True)
    for arm in arguments.arms:  # a mistake in a space is found before the first search
        read_space(SPACES / f"{arm}.yaml")
    if arguments.plan:
        return
    if any(arm.removesuffix("-lora") in WITH_TRAJECTORIES for arm in arguments.arms):
        cache_trajectories(arguments.teacher, arguments.out / "cache")
    found: dict[str, TuneResult] = {}
    for arm in arguments.arms:
        print(f"--- {arm} ---", flush=True)
        found[arm] = run_arm(arm, arguments)
        (arguments.out / "table.md").write_text(show(found))
        draw(found).savefig(arguments.out / "tune.png", dpi=110)


if __name__ == "__main__":
    main()
