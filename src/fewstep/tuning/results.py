"""The results of a search: its best trial, a table in the terminal, trials.csv and best.yaml."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewstep.atomic import write_text
from fewstep.config.load import dump_recipe
from fewstep.tuning.budget import rung_shares
from fewstep.tuning.objective import Objective
from fewstep.tuning.search import BEST, Search
from fewstep.tuning.study import FAILED, TrialRow

SHOWN = 10  # trials in the terminal


def ranked(rows: Iterable[TrialRow], objective: Objective) -> list[TrialRow]:
    """Trials with a score, the best one first: those that got further first, then by their last score. Scores after
    different lengths do not compare. Failed trials are left out."""
    sign = -1 if objective.maximizes else 1
    scored = [row for row in rows if row.scores and row.state != FAILED]
    return sorted(scored, key=lambda row: (-len(row.scores), sign * row.scores[-1], row.number))


def best_row(rows: Iterable[TrialRow], objective: Objective) -> TrialRow | None:
    """The best trial, if any has a score."""
    return next(iter(ranked(rows, objective)), None)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """For each dotted key its shortest ending that no other key has, of at least two parts where it has them."""
    parts = {key: key.split(".") for key in keys}
    found = {}
    for key, own in parts.items():
        count = min(2, len(own))
        while count < len(own) and any(other[-count:] == own[-count:] for name, other in parts.items() if name != key):
            count += 1
        found[key] = ".".join(own[-count:])
    return found


def shown(value: Any) -> str:
    """A value in short."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def print_table(search: Search, rows: Sequence[TrialRow]) -> None:
    """The best trials, on standard output."""
    names = short_names(search.space.keys)
    table = Table(title=f"{search.recipe.name}: best trials by {search.objective.metric}")
    for column in ("trial", "length", "min", search.objective.metric, *names.values()):
        table.add_column(column, justify="left" if column == "trial" else "right", overflow="fold")
    for row in ranked(rows, search.objective)[:SHOWN]:
        cells = [str(row.number), length(row, search.rungs), f"{row.minutes:.1f}", f"{row.scores[-1]:.4g}"]
        table.add_row(*cells, *(shown(row.values[key]) for key in names))
    Console().print(table)


def length(row: TrialRow, rungs: int) -> str:
    """How far a trial got: "whole", or its share at its last rung."""
    return length_of(rung_shares(rungs)[len(row.scores) - 1])


def length_of(share: float) -> str:
    """A share of a whole trial, as in "1/3"."""
    return "whole" if share == 1 else f"1/{round(1 / share)}"


def described(values: Mapping[str, Any]) -> str:
    """Values in a line, with short names."""
    names = short_names(values)
    return ", ".join(f"{names[key]} {shown(value)}" for key, value in values.items())


def write_csv(file: Path, search: Search, rows: Sequence[TrialRow]) -> None:
    """Every trial, one a line; scores by the share of the whole trial after which they were measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = [f"{search.objective.metric}@{share:.3g}" for share in rung_shares(search.rungs)]
    writer.writerow(["trial", "state", "reason", "steps", "steps_taken", "minutes", *scores, *search.space.keys])
    for row in rows:
        found = [f"{score:.6g}" for score in row.scores] + [""] * (search.rungs - len(row.scores))
        head = [row.number, row.state, row.reason, row.steps, row.taken, f"{row.minutes:.3f}"]
        writer.writerow([*head, *found, *(json.dumps(row.values.get(key)) for key in search.space.keys)])
    write_text(file, text.getvalue())


def write_best(folder: Path, search: Search, best: TrialRow, validation: int) -> Path:
    """The recipe of the best trial, for ``fewstep distill``."""
    score = f"{search.objective.metric} {best.scores[-1]:.4g} on {validation} validation prompts"
    head = f"# Found by fewstep tune: trial {best.number}, {score}, after {best.taken} of {best.steps} steps\n"
    changes = "".join(f"#   {key}: {json.dumps(value)}\n" for key, value in best.values.items())
    write_text(folder / BEST, head + changes + dump_recipe(search.best_recipe(best.values, best.steps)))
    return folder / BEST


def failures(rows: Sequence[TrialRow]) -> Mapping[str, int]:
    """How often trials failed, by reason."""
    reasons = [row.reason for row in rows if row.state == FAILED]
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
