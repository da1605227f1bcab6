"""Prints docs/recipes.md from the pydantic models: ``python -m fewstep.config.reference > docs/recipes.md``."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fewstep.config.load import recipe_model
from fewstep.config.schedule import ConstantSettings, PiecewiseSettings, RampSettings
from fewstep.core.registry import load_plugins, recipe_kinds

INTRODUCTION = """\
# Recipes

Generated from the code by `make docs`. A recipe is a YAML file; `kind` selects what it contains. `-s key=value`
overrides a field on the command line, with dots between section and field: `-s train.steps=400`. A field set to `null`
has its default meaning, and a section or loss term set to `null` is left out.

A *weight* is a number from 0, or a schedule over the steps:

```text
weight: 1.0
weight: {kind: linear, start: 0, end: 1, first_step: 0, last_step: 500}
weight: {kind: cosine, start: 1, end: 0, first_step: 50%, last_step: 100%}
weight: {kind: piecewise, values: {0: 0, 85%: 1}}
```

A *step* is a number of finished steps, or a share of `train.steps` such as `85%`.
"""
_SCHEDULE = {ConstantSettings, RampSettings, PiecewiseSettings}


def page() -> str:
    """The whole page."""
    load_plugins()
    lines = [INTRODUCTION]
    for kind in sorted(recipe_kinds.names()):
        model = recipe_model(kind)
        lines += [f"## kind: {kind}", "", f"{model.model_fields['kind'].description}", "", *_table(model)]
    return "\n".join(lines).rstrip() + "\n"


def _table(model: type[BaseModel]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in _fields(model, ""):
        if key == "kind" or not field.description:
            continue  # the heading, and names that select a member of a union
        yield f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {_escape(field.description or '')} |"
    yield ""


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a model and of its sections, by dotted key; members of a union are told apart by their name."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        sections = [section for section in _sections(field.annotation) if section not in _SCHEDULE]
        for section in sections:
            tag = f"({_tag(section)})" if len(sections) > 1 else ""
            item = ".0" if get_origin(_plain(field.annotation)) is list else ""
            item = ".PART" if get_origin(_plain(field.annotation)) is dict else item
            yield from _fields(section, f"{key}{tag}{item}.")


def _tag(section: type[BaseModel]) -> str:
    (tag,) = get_args(section.model_fields["name"].annotation)
    return f"name: {tag}"


def _plain(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _type(annotation: Any) -> str:
    annotation = _plain(annotation)
    if set(_sections(annotation)) & _SCHEDULE:
        return "weight"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        names = ["null" if part is type(None) else _type(part) for part in parts]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (list, tuple):
        return "list of " + _type(parts[0])
    if origin is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    plain = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    return plain.get(getattr(annotation, "__name__", ""), str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return ""
    value = "null" if field.default is None else str(field.default).lower() if isinstance(field.default, bool) else None
    return f"`{value if value is not None else field.default}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
