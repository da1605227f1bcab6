"""What a search is, and its folder: the same command continues the search that is there.

runs/<name>-tune/
    search.json             recipe, space, objective and budget
    study.db                Optuna's storage: every trial, also the failed ones
    trials/0007/            a run for each trial
    cache/  encoded-prompts/  teacher-*.safetensors     shared by the trials
    trials.csv  best.yaml  report.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.atomic import write_text
from fewstep.config.load import parse_recipe
from fewstep.config.recipe import DistillRecipe, flat_recipe
from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.outputs import check_folder
from fewstep.tuning.objective import Objective
from fewstep.tuning.space import Choices, Space, with_values

SEARCH, STUDY, TRIALS, BEST = "search.json", "study.db", "trials.csv", "best.yaml"
REPORT = "report.html"

#: What a search writes into its folder: all that ``overwrite`` may delete.
SEARCH_FILES = (
    SEARCH,
    "study.db*",
    "trials",
    "cache",
    "encoded-prompts",
    "teacher-*.safetensors",
    TRIALS,
    BEST,
    REPORT,
)

_NEVER = 10**9  # steps


@dataclass(frozen=True)
class Search:
    """
    Attributes:
        recipe: without the searched values.
        rungs: how often a trial is measured; the last time at its end.
        trial_minutes: of training in a whole trial; None where ``trial_steps`` limits it.
        trial_steps: of a whole trial; None where ``trial_minutes`` limits it.
    """

    recipe: DistillRecipe
    space: Space
    objective: Objective
    rungs: int
    trial_minutes: float | None
    trial_steps: int | None

    def trial_recipe(self, number: int, values: Mapping[str, Any], steps: int) -> DistillRecipe:
        """The recipe that a trial trains with: the whole trial's steps, and no file that nobody needs.

        Raises:
            UserError: the values do not fit together.
        """
        own = {
            "name": f"trial-{number}",
            "train.steps": steps,
            "train.max_minutes": None,
            "train.keep_best": None,
            "train.max_checkpoints": 1,
            "train.sample_every": 0,
            "train.save_every": _NEVER,
            "train.on_alert": "off" if self.recipe.train.on_alert == "off" else "stop",
            "evaluate.enabled": False,
            "evaluate.validate_every": _NEVER,  # and where a rung ends
        }
        return with_values(self.recipe, {**values, **own}, f"trial {number}")

    def best_recipe(self, values: Mapping[str, Any], steps: int) -> DistillRecipe:
        """The recipe that trains as a trial did."""
        own = {"name": f"{self.recipe.name}-tuned", "train.steps": steps, "train.max_minutes": None}
        return with_values(self.recipe, {**values, **own}, BEST)

    def tree(self) -> dict[str, Any]:
        """As JSON values."""
        keys = {
            key: part.examples() if isinstance(part, Choices) else vars(part) for key, part in self.space.keys.items()
        }
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "space": keys,
            "objective": vars(self.objective),
            "budget": {"rungs": self.rungs, "minutes": self.trial_minutes, "steps": self.trial_steps},
        }


def claim(folder: Path, search: Search, overwrite: bool) -> None:
    """Begin a search in a folder, or continue the same one.

    Raises:
        UserError: the folder holds another search, or other files under a search's names.
    """
    check_folder(folder)
    file = folder / SEARCH
    own = [found for pattern in SEARCH_FILES for found in sorted(folder.glob(pattern))]
    if own and not file.exists():
        raise UserError(f"{own[0]} is in the way: {folder} is not a search (no {SEARCH}); use another --out")
    if overwrite:
        for found in own:
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    elif file.exists():
        changes = _changes(read_search(folder), search.tree())
        if changes:
            raise UserError(f"{folder} holds another search ({', '.join(changes)}); use another --out, or --overwrite")
        return
    write_text(file, json.dumps(search.tree(), indent=1))


def read_search(folder: Path) -> dict[str, Any]:
    """The tree of the search in a folder. Raises: UserError if it cannot be read."""
    file = folder / SEARCH
    with reading(file):
        text = file.read_text(encoding="utf-8")
    try:
        tree = json.loads(text)
        parse_recipe(tree["recipe"], str(file))
        return {key: dict(tree[key]) for key in ("recipe", "space", "objective", "budget")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); use another --out, or --overwrite") from None


def earlier_budget(folder: Path) -> dict[str, Any]:
    """The budget of the trials of the search in a folder; empty if there is none."""
    return read_search(folder)["budget"] if (folder / SEARCH).exists() else {}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two searches, as "key: old -> new"."""
    before, after = flat_recipe(old), flat_recipe(json.loads(json.dumps(new)))
    return [
        f"{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key, "(none)") != after.get(key, "(none)")
    ]
