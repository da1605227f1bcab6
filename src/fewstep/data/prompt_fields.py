"""The prompts in one row of a file or dataset, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.data.prompt_text import clean_prompt
from fewstep.errors import UserError

_KINDS = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", bytes: "bytes"}


def row_prompts(row: Any, column: str, where: str) -> list[str]:
    """The prompts of an object, or of a text that stands for itself. Errors as for the functions below."""
    if not isinstance(row, dict):
        return field_prompts(row, "the row", where)
    column_position(list(row), column, where)
    return field_prompts(row[column], column, where)


def field_prompts(value: Any, column: str, where: str) -> list[str]:
    """The prompts in a field, cleaned: a text, a list of texts, or nothing. Raises: UserError for other values."""
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str | None):
            raise UserError(f"{where}: {column} holds {_KINDS.get(type(each), 'a value')}, where a text is expected")
    return [clean_prompt(each or "") for each in values] or [""]


def column_position(names: Sequence[str], column: str, where: str) -> int:
    """The one place of a column among the names. Raises: UserError if there is none, or another of this name."""
    if names.count(column) != 1:
        problem = "two columns" if column in names else "no"
        listed = ", ".join(map(str, names))[:200] or "none"
        raise UserError(
            f"{where}: {problem} {column!r}; there are {listed}; set --column, or prompts.column in a recipe"
        )
    return names.index(column)
