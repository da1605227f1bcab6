"""One line for what is wrong in a recipe: the key as the user wrote it, and the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fewstep.config.renamed_keys import RENAMED_KEYS

#: In known keys: any name in a mapping, any number in a list.
PART, ITEM = "PART", "0"


def explain(error: ValidationError, tree: Mapping[str, Any], model: type[BaseModel]) -> str:
    """The first of pydantic's errors, and how many more there are.

    Args:
        tree: what was validated.
        model: what it was validated against.
    """
    errors = error.errors(include_url=False)
    # An unknown key first: a misspelled required key is also reported as missing, and the spelling is the reason.
    errors.sort(key=lambda one: one["type"] != "extra_forbidden")
    first = errors[0]
    key = ".".join(_without_tags(first["loc"], tree))
    if first["type"] == "extra_forbidden":
        message = f"unknown key {key}{_suggestion(key, model)}"
    elif first["type"] in ("missing", "union_tag_not_found"):
        message = f"{key} is missing" if first["type"] == "missing" else f"{key}.{_tag(first['msg'])} is missing"
    elif first["type"] == "union_tag_invalid":
        name, given, known = (first["ctx"][field] for field in ("discriminator", "tag", "expected_tags"))
        message = f"{key}.{name[1:-1]}: input should be {known} (got {given!r})"
    else:
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[:1].lower() + problem[1:]
        given = first["input"]
        message = f"{key}: {problem}" if key else problem
        if isinstance(given, str | int | float | bool) or given is None:
            message += f" (got {given!r})"
    more = len(errors) - 1
    return message + (f" (and {more} more {'mistake' if more == 1 else 'mistakes'})" if more else "")


def _tag(message: str) -> str:
    """The discriminator that pydantic names in quotes."""
    return message.split("'")[1]


def _without_tags(location: Sequence[str | int], tree: Any) -> Iterator[str]:
    """The parts of an error's location that are keys of the tree, without the tags of discriminated unions."""
    node = tree
    for index, part in enumerate(location):
        if isinstance(node, Mapping):
            if part not in node and part in (node.get("name"), node.get("kind")):
                continue
            yield str(part)
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            yield str(part)
            node = node[part] if part < len(node) else None  # a missing one, of a list that is too short
        elif isinstance(node, BaseModel) or index == 0:
            yield str(part)
        else:
            return  # inside a plain value, such as a number that stands for a constant schedule


def _suggestion(key: str, model: type[BaseModel]) -> str:
    stem = key.removeprefix("stages.").lstrip("0123456789").lstrip(".") if key.startswith("stages.") else key
    if stem in RENAMED_KEYS:
        return f", which is now {RENAMED_KEYS[stem]}"
    known = list(_keys(model))
    parent, _, leaf = key.rpartition(".")
    siblings = [own for above, _, own in (name.rpartition(".") for name in known) if _is_same(above, parent)]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    prefix = f"{parent}." if parent else ""
    near = [prefix + own for own in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)]
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known keys: {', '.join(prefix + own for own in dict.fromkeys(siblings))}" if siblings else ""


def _is_same(known: str, key: str) -> bool:
    """Whether a key is the known one, where a name or number of the user's stands for PART or 0."""
    pairs = list(zip(known.split("."), key.split("."), strict=False))
    return known.count(".") == key.count(".") and all(a in (b, PART, ITEM) for a, b in pairs)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a model, sections included, as docs/recipes.md has them."""
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = {dict: f"{PART}.", list: f"{ITEM}."}.get(get_origin(_plain(field.annotation)), "")
        for section in _sections(field.annotation):
            yield from _keys(section, f"{prefix}{name}.{inner}")


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, unions and optional ones included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
