"""Overrides of a recipe's fields from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from fewstep.errors import UserError

_COMMENT = re.compile(r"\s#.*", re.DOTALL)


def set_override(tree: dict[str, Any], override: str, model: type[BaseModel] | None) -> None:
    """Put ``"train.steps=100"`` into a nested recipe.

    The value of a field of text is taken as it is, with ``#`` and ``:`` in it, unless it is quoted or null; any other
    value is YAML.

    Args:
        model: of the recipe; None if its kind is not known.

    Raises:
        UserError: it is not of this form, or names no place in the recipe.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"-s {override}: expected key=value, as in -s train.steps=100")
    value = text.strip() if _is_text(model, parts) and _is_plain(text.strip()) else _parse(override, text)
    set_value(tree, parts, value, f"-s {override}")


def set_value(tree: dict[str, Any], parts: Sequence[str], value: Any, source: str) -> None:
    """Put a value into a nested recipe, at the place that the parts of a dotted key name.

    Args:
        source: names the value in errors.

    Raises:
        UserError: there is no such place in the recipe.
    """
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, list):  # a stage, by its number from 0
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"{source}: {part} is not one of 0 to {len(node) - 1}")
            node = node[int(part)]
        else:
            # A missing section may have defaults for all else; a wrong name is found by the schema, with a suggestion.
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{source}: {part} holds a value, not further keys")
    if isinstance(node, list):
        raise UserError(f"{source}: name a field of one of them, as in {parts[-2]}.0.train.steps=100")
    node[parts[-1]] = value


def _parse(override: str, text: str) -> Any:
    """Raises: UserError if the text is not YAML, or ends with what YAML takes for a comment."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2024-13-45, a number of 5000 digits
        raise UserError(f"-s {override}: the value is not valid YAML; quote text with special characters") from None
    comment = _COMMENT.search(text)
    if comment is not None and _same(text[: comment.start()], value):
        raise UserError(f"-s {override}: YAML takes {comment[0].strip()!r} for a comment; quote the value")
    return value


def _same(text: str, value: Any) -> bool:
    """Whether this is the whole text of a value."""
    try:
        return bool(yaml.safe_load(text) == value)
    except (yaml.YAMLError, ValueError, RecursionError):  # the end of a quoted text is missing
        return False


def _is_plain(text: str) -> bool:
    """Whether text stands for itself, rather than being quoted or null."""
    return text != "" and text[0] not in "'\"" and text.lower() not in ("null", "~")


def _is_text(model: type[BaseModel] | None, parts: Sequence[str]) -> bool:
    """Whether the key's field holds text, or nothing."""
    found: list[Any] = [] if model is None else [model]
    for part in parts:
        found = [inner for each in found for inner in _inside(each, part)]
    leaves = [leaf for each in found for leaf in _leaves(each)]
    texts = [leaf is str or (get_origin(leaf) is Literal and isinstance(get_args(leaf)[0], str)) for leaf in leaves]
    return any(texts) and all(text or leaf is type(None) for text, leaf in zip(texts, leaves, strict=True))


def _leaves(annotation: Any) -> Iterator[Any]:
    """The members of a union; Annotated types without their notes."""
    if get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _leaves(member)
    else:
        yield annotation


def _inside(annotation: Any, part: str) -> Iterator[Any]:
    """The types of a key of a section, of a mapping's values, or of a list's items."""
    for leaf in _leaves(annotation):
        if isinstance(leaf, type) and issubclass(leaf, BaseModel):
            if part in leaf.model_fields:
                yield leaf.model_fields[part].annotation
        elif get_origin(leaf) in (list, dict):
            yield get_args(leaf)[-1]
