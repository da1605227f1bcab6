"""An equal budget of tuning for every variant of the ablation, and for LoRA forms of five methods, on the bundled
teacher.

Every arm is a search of `fewstep tune` in its own space (benchmarks/spaces) with the same number of trials, and the
same minutes of training in each whole trial. The recipe's own values and two settings that were found by hand are among
them; a trial whose process was killed is replaced. Trials are compared on validation prompts alone. The same command
resumes, arm by arm; an arm with all its trials is not searched again.

    python benchmarks/tune.py --out runs/tune [--arms hybrid "hybrid, LoRA" ...] [--trials 24] [--trial-minutes 3]
    python benchmarks/ablation.py --tuned runs/tune     # the ablation with each variant's best trial

The cost is printed before the work starts. On a CPU a trial's steps follow from the time that its thread computes, so
that other work on the machine makes the searches longer, not the trials shorter; the blocks are compiled where there is
a compiler. The teacher's trajectories, which some arms need, are made once, in ``<out>/cache``, and so are its images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from ablation import VARIANTS, cache_trajectories, cached
from ablation_results import arm_folder
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.training.tracking import read_metrics
from fewstep.tuning.budget import mean_length
from fewstep.tuning.results import length, ranked, short_names
from fewstep.tuning.search import STUDY
from fewstep.tuning.space import Space, read_space
from fewstep.tuning.study import KILLED, WAITING, Study, importances
from fewstep.tuning.tune import RUNGS, TuneResult, tune

SPACES = Path(__file__).parent / "spaces"
LORA = ("models.train=lora", "models.rank=32")

#: Arm -> its space in benchmarks/spaces. The recipe and the overrides are those of the ablation's variant.
FULL = {
    **dict.fromkeys(("hybrid", "constrained", "full", "shared"), "hybrid"),
    "CA only": "ca",
    "DM only": "dm",
    "CA + mean-variance": "ca-mean-variance",
    "CA + GAN": "ca-gan",
    "DMD": "dmd",
    "DMD2": "dmd2",
    "CDM": "cdm",
    "trajectory": "trajectory",
    "micro-aligned": "aligned",
}
IN_BOTH_FORMS = ("hybrid", "DMD", "DMD2", "CDM", "trajectory")
ARMS = FULL | {f"{arm}, LoRA": f"{FULL[arm]}-lora" for arm in IN_BOTH_FORMS}

#: Settings from docs/lab-notes/students.md that every search tries, where its space has the key. LoRA's rates are the
#: usual multiples of these.
BY_HAND = {
    "optim.student.lr": 5.0e-4,
    "optim.fake_score.lr": 7.0e-4,
    "optim.student.ema_decay": 0.9,
    "method.fake_score_updates": 1,
}
TRIED = (
    BY_HAND | {"method.terms.cfg_augmentation.guidance_scale": 1.2, "train.batch_size": 32},
    BY_HAND | {"method.terms.cfg_augmentation.guidance_scale": 2.0, "train.batch_size": 16},
)
LORA_FACTOR = 3

#: Validation metrics of the best trial in the table.
SHOWN = {"object_acc": "{:.1%}", "nearest_real_acc": "{:.1%}", "fd_teacher[open-nsfw]": "{:.1f}", "hf_energy": "{:.5f}"}


def run_arm(arm: str, arguments: argparse.Namespace) -> TuneResult:
    """Search an arm, or continue, or read what is there."""
    recipe, changes = VARIANTS[arm.removesuffix(", LoRA")]
    common = [
        *(f"teacher={arguments.teacher}", f"evaluate.validation_prompts={arguments.prompts}"),
        *("train.log_every=10", f"train.precision={arguments.precision}", "models.compile=auto"),
        *(*changes, *(LORA if arm.endswith("LoRA") else ())),
        *(("train.on_alert=off",) if arm.startswith("CA") else ()),  # without distribution matching variance grows
    ]
    common += cached(recipe, changes, arguments.out / "cache")
    folder, space = arm_folder(arguments.out, arm), read_space(SPACES / f"{ARMS[arm]}.yaml")
    search = partial(
        tune,
        recipe,
        space,
        minutes=arguments.minutes,
        out=folder,
        trial_minutes=arguments.trial_minutes,
        rungs=arguments.rungs,
        metric=arguments.metric,
        overrides=common,
    )
    torch.compiler.reset()  # every arm has its own graphs, and their number is limited
    begun = search(trials=0)
    for made in arguments.out.glob("*/teacher-*.safetensors"):  # all arms have one teacher and the same prompts
        if not (folder / made.name).exists():
            shutil.copy(made, folder)
    study = Study(folder / STUDY, space, begun.search.objective)
    rows = study.rows()
    if not any(row.state == WAITING and row.number > 0 for row in rows):
        for drawn in suggestions(recipe, common, space, LORA_FACTOR if arm.endswith("LoRA") else 1):
            if not any(drawn.items() <= row.drawn.items() for row in rows):
                study.suggest(drawn)
    while True:
        found = search(trials=arguments.trials + killed(begun))
        if killed(found) == killed(begun):
            return found
        begun = found


def killed(found: TuneResult) -> int:
    """How many trials ended with their process."""
    return sum(row.reason == KILLED for row in found.rows)


def suggestions(recipe: str, overrides: list[str], space: Space, factor: float) -> Iterator[dict[str, Any]]:
    """The values of ``TRIED`` for the keys of a space; other keys have the recipe's own."""
    plain = load_recipe(recipe, overrides)
    assert isinstance(plain, DistillRecipe)
    for values in TRIED:
        own = {
            key: value * (factor if key.endswith(".lr") else 1) for key, value in values.items() if key in space.keys
        }
        changed = load_recipe(recipe, [*overrides, *(f"{key}={value}" for key, value in own.items())])
        assert isinstance(changed, DistillRecipe)
        yield space.drawn(plain) | space.drawn(changed)


def cost(arguments: argparse.Namespace) -> str:
    """What the searches cost if one trial in three passes each rung."""
    training = len(arguments.arms) * arguments.trials * arguments.trial_minutes * mean_length(arguments.rungs)
    return (
        f"{len(arguments.arms)} arms, each {arguments.trials} trials of up to {arguments.trial_minutes:g} minutes: "
        f"about {training / 60:.1f} hours of training on an idle machine, and the measuring of {arguments.prompts} "
        f"validation prompts up to {arguments.rungs} times a trial; at most {arguments.minutes / 60:.1f} hours each"
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
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--trials", type=int, default=24, help="of each arm")
    parser.add_argument("--trial-minutes", type=float, default=3.0, help="of training in a whole trial")
    parser.add_argument("--rungs", type=int, default=RUNGS, help="how often a trial is measured; 1 stops none early")
    parser.add_argument("--minutes", type=float, default=180.0, help="at most so many for each arm")
    parser.add_argument("--metric", default="fd_teacher")
    parser.add_argument("--prompts", type=int, default=128, help="validation prompts")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--teacher", default="micro")
    parser.add_argument("--plan", action="store_true", help="print the cost, and stop")
    arguments = parser.parse_args()
    print(cost(arguments), flush=True)
    for arm in arguments.arms:  # a mistake in a space is found before the first search
        read_space(SPACES / f"{ARMS[arm]}.yaml")
    if arguments.plan:
        return
    cache_trajectories(arguments.teacher, arguments.out / "cache")
    found: dict[str, TuneResult] = {}
    for arm in arguments.arms:
        print(f"--- {arm} ---", flush=True)
        found[arm] = run_arm(arm, arguments)
        (arguments.out / "table.md").write_text(show(found))
        draw(found).savefig(arguments.out / "tune.png", dpi=110)


if __name__ == "__main__":
    main()
