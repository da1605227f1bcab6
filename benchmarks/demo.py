"""The demo's old recipe beside the new one: time from start to report, and the student's quality.

Each run is `fewstep distill RECIPE` in a fresh process and a new folder, without a cache that another run left; the
recipes alternate, so that a change of the machine's load meets both. The time is that to the report; then all students
are measured on the same test prompts, which is not timed.

    python benchmarks/demo.py [--old RECIPE] [--new RECIPE] [--repeats 2] [--out runs/demo-comparison] [-s KEY=VALUE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ablation import Evaluator
from rich.console import Console
from rich.table import Table

from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe, StagesRecipe
from fewstep.errors import UserError
from fewstep.models.pipeline import load
from fewstep.outputs import check_folder

OLD = "micro-aligned"
NEW = "micro-turbo"

#: Where libraries keep files for later runs: each run has its own.
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

#: Figure -> its title and format.
SHOWN = {
    "minutes": ("start to report, min", "{:.2f}"),
    "object_acc": ("object accuracy", "{:.1%}"),
    "nearest_real_acc": ("nearest real", "{:.1%}"),
    "style_acc": ("style accuracy", "{:.1%}"),
    "fd_teacher": ("FD to the teacher", "{:.1f}"),
    "hf_energy_ratio": ("hf energy, student / teacher", "{:.3f}"),
}


def run(recipe: str, folder: Path, overrides: list[str]) -> dict[str, float]:
    """The time and the student's figures of one run, which is kept in its folder.

    Raises:
        UserError: the run failed; its output is in ``<folder>.log``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    caches = folder.with_suffix(".caches")
    shutil.rmtree(caches, ignore_errors=True)
    environment = os.environ | {name: str(caches / name.lower()) for name in CACHES}
    command = [sys.executable, "-m", "fewstep", "distill", recipe, "--out", str(folder)]
    command += [word for override in overrides for word in ("-s", override)]
    log = folder.with_suffix(".log")
    start = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    minutes = (time.monotonic() - start) / 60
    shutil.rmtree(caches, ignore_errors=True)
    if done.returncode:
        raise UserError(f"{recipe}: the run failed with exit code {done.returncode}; see {log}")
    return {"minutes": minutes}


def quality(student: Path, evaluator: Evaluator) -> dict[str, float]:
    """The student's figures on the evaluator's prompts."""
    teacher, own = evaluator.teacher["teacher, 50 steps"], evaluator.measure(load(student))
    found = own | {"hf_energy_ratio": (own["hf_energy"] or 0) / (teacher["hf_energy"] or 1)}
    return {key: value for key, value in found.items() if value is not None}


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    """Means over the repeats with their range, and the ratio of the times."""
    table = Table(title="Old and new recipe, alternating")
    for column in ("recipe", "runs", *(title for title, _ in SHOWN.values())):
        table.add_column(column)
    for name, repeats in runs.items():
        cells = [cell([each[key] for each in repeats if key in each], style) for key, (_, style) in SHOWN.items()]
        table.add_row(name, str(len(repeats)), *cells)
    Console(width=160).print(table)
    old, new = (statistics.mean(each["minutes"] for each in repeats) for repeats in runs.values())
    print(f"time, new / old: {new / old:.3f}")


def cell(values: list[float], style: str) -> str:
    if not values:
        return "–"
    mean = style.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({style.format(min(values))} to {style.format(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default=str(OLD), metavar="RECIPE")
    parser.add_argument("--new", default=NEW, metavar="RECIPE")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each recipe")
    parser.add_argument("--prompts", type=int, default=200, help="test prompts on which all students are measured")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-comparison"))
    parser.add_argument("-s", "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    recipes = {"old": arguments.old, "new": arguments.new}
    for recipe in recipes.values():  # mistakes before the first run
        loaded = load_recipe(recipe, arguments.overrides)
        if not isinstance(loaded, DistillRecipe | StagesRecipe) or not loaded.evaluate.enabled:
            sys.exit(f"{recipe}: not a distillation that ends with a report")
    check_folder(arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {f"{name}: {recipe}": [] for name, recipe in recipes.items()}
    for repeat in range(arguments.repeats):
        for name, recipe in recipes.items():
            print(f"run {repeat + 1} of {arguments.repeats}, {name}: {recipe}", flush=True)
            found = run(recipe, arguments.out / f"{name}-{repeat}", arguments.overrides)
            runs[f"{name}: {recipe}"].append(found)
    evaluator = Evaluator(load("micro"), arguments.prompts, arguments.out)
    for name, repeats in runs.items():
        for repeat, found in enumerate(repeats):
            found |= quality(arguments.out / f"{name.partition(':')[0]}-{repeat}" / "student", evaluator)
    (arguments.out / "runs.json").write_text(json.dumps(runs, indent=1))
    show(runs)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
