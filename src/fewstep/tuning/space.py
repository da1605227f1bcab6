"""The search space: recipe keys with the values that a search tries, from a YAML file."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.config.load import parse_recipe, read_yaml
from fewstep.config.overrides import set_value
from fewstep.config.recipe import DistillRecipe
from fewstep.errors import UserError

#: Keys of the file that are no recipe keys.
METRIC, DIRECTION = "metric", "direction"

#: Recipe keys that are the same in all trials: what is measured, on what, and for how long.
FIXED = {
    "kind": "it is what is searched",
    "name": "it has no effect on quality",
    "teacher": "distances to different teachers do not compare",
    "prompts": "all trials must train and validate on the same prompts",
    "evaluate": "all trials must be measured alike",
    "train.steps": "the length of a trial is its budget; see --trial-minutes and --trial-steps",
    "train.max_minutes": "the length of a trial is its budget; see --trial-minutes and --trial-steps",
}

_RANGE_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; integers where both are.

    Attributes:
        log: drawn uniformly in the logarithm.
        step: the distance of neighboring values; None is any number, and every integer.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        return all(isinstance(value, int) for value in (self.low, self.high, 1 if self.step is None else self.step))

    def examples(self) -> list[Any]:
        """Values to check: the two ends."""
        return [self.low, self.high]

    def contains(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and math.isclose(steps, round(steps), abs_tol=1e-6)


@dataclass(frozen=True)
class Choices:
    """A list of values, by their labels: a value itself where it is a scalar, else its JSON text."""

    values: Mapping[str | float | bool | None, Any]

    def examples(self) -> list[Any]:
        return list(self.values.values())


@dataclass(frozen=True)
class Space:
    """
    Attributes:
        source: the file, for messages.
        keys: what is tried, by dotted recipe key.
        metric, direction: of the file; None where it names none.
    """

    source: str
    keys: Mapping[str, Range | Choices]
    metric: str | None = None
    direction: str | None = None

    def values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Recipe values of what an optimizer drew, in the file's order: labels become the values of choices."""
        return {
            key: part.values[drawn[key]] if isinstance(part, Choices) else drawn[key]
            for key, part in self.keys.items()
            if key in drawn
        }

    def drawn(self, recipe: DistillRecipe) -> dict[str, Any]:
        """The recipe's own values where they lie in the space, as an optimizer would draw them."""
        tree = recipe.model_dump(mode="json")
        found: dict[str, Any] = {}
        for key, part in self.keys.items():
            if isinstance(part, Choices):
                own = [label for label, value in part.values.items() if _is_own(recipe, key, value)]
                found |= {key: own[0]} if own else {}
            elif part.contains(value := _value_at(tree, key)):
                found[key] = value
        return found

    def check(self, recipe: DistillRecipe) -> None:
        """Check every key, and the ends or choices of each, against the recipe's models.

        Raises:
            UserError: there is no such key, or it cannot have such a value.
        """
        first = {key: part.examples()[0] for key, part in self.keys.items()}
        for key, part in self.keys.items():
            for value in part.examples():
                with_values(recipe, {**first, key: value}, f"{self.source}: {key}: {_shown(value)}")


def with_values(recipe: DistillRecipe, values: Mapping[str, Any], source: str) -> DistillRecipe:
    """The recipe with other values, by dotted key. Raises: UserError that begins with ``source``."""
    tree = recipe.model_dump(mode="json")
    for key, value in values.items():
        set_value(tree, key.split("."), copy.deepcopy(value), source)  # a later key may lie inside this value
    changed = parse_recipe(tree, source)
    assert isinstance(changed, DistillRecipe)
    return changed


def read_space(file: str | Path) -> Space:
    """The space in a YAML file: ``key: {low, high, log, step}`` or ``key: [choices]``, and ``metric``, ``direction``.

    Raises:
        UserError: one line with the file, the key and what is wrong.
    """
    tree = read_yaml(Path(file), "a search space")
    texts = {name: tree.pop(name, None) for name in (METRIC, DIRECTION)}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UserError(f"{file}: {name}: expected a name, not {_shown(text)}")
    if not tree:
        raise UserError(f"{file}: no key to search; give some, as in optim.student.lr: {{low: 1.0e-4, high: 1.0e-3}}")
    keys = {}
    for key, given in tree.items():
        where = f"{file}: {key}"
        if not isinstance(key, str) or not all(key.split(".")):
            raise UserError(f"{where}: expected a dotted recipe key, as in optim.student.lr")
        for fixed, why in FIXED.items():
            if f"{key}.".startswith(f"{fixed}."):
                raise UserError(f"{where}: cannot be searched: {why}")
        keys[key] = _choices(given, where) if isinstance(given, list) else _range(given, where)
    return Space(str(file), keys, texts[METRIC], texts[DIRECTION])


def _choices(given: list[Any], where: str) -> Choices:
    found: dict[str | float | bool | None, Any] = {}
    for value in given:
        scalar = value is None or isinstance(value, str | int | float | bool)
        label = value if scalar else json.dumps(value)
        if label in found:  # 1, 1.0 and true are one key of a mapping
            raise UserError(f"{where}: {_shown(value)} is given twice")
        found[label] = value
    if len(found) < 2:
        raise UserError(f"{where}: give at least 2 choices; set a single value with -s {where.rpartition(': ')[2]}=...")
    return Choices(found)


def _range(given: Any, where: str) -> Range:
    form = "expected a list of choices, or {low: ..., high: ...} with log: true or step"
    if not isinstance(given, dict):
        raise UserError(f"{where}: {_shown(given)}: {form}")
    unknown = [key for key in given if key not in _RANGE_KEYS]
    if unknown or not {"low", "high"} <= given.keys():
        problem = f"unknown key {unknown[0]}" if unknown else "low or high is missing"
        raise UserError(f"{where}: {problem}; {form}")
    log, step = given.get("log", False), given.get("step")
    if not isinstance(log, bool):
        raise UserError(f"{where}: log: expected true or false, not {_shown(log)}")
    for name in ("low", "high", "step"):
        value = given.get(name)
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not numeric and not (name == "step" and value is None):
            raise UserError(f"{where}: {name}: expected a number, not {_shown(value)}{_float_hint(value)}")
    low, high = given["low"], given["high"]
    if low >= high:
        raise UserError(f"{where}: low {low:g} is not below high {high:g}")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{where}: log: true needs low above 0, and no step")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: step: expected a number above 0 and at most high - low, not {step:g}")
    return Range(low, high, log, step)


def _float_hint(value: Any) -> str:
    """YAML reads 1e-4 as text: its numbers need a point."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return f"; write {number:.1e}" if isinstance(value, str) else ""


def _is_own(recipe: DistillRecipe, key: str, value: Any) -> bool:
    """Whether a recipe stays the same with this value: a section may leave out what has its default."""
    try:
        return with_values(recipe, {key: value}, key).model_dump(mode="json") == recipe.model_dump(mode="json")
    except UserError:  # it needs other keys
        return False


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _value_at(tree: Any, key: str) -> Any:
    """The value of a dotted key; None where a section on its way is missing."""
    for part in key.split("."):
        if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict):
            tree = tree.get(part)
        else:
            return None
    return tree
