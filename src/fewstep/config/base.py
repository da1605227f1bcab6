"""The base of all sections of recipes."""

from __future__ import annotations

from typing import Annotated, Any, LiteralString, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from fewstep.core.seeds import MAX_SEED

Fraction = Annotated[float, Field(ge=0, le=1)]

# Ranges of what reaches torch, so that a slip of the pen is refused before it fills the memory or overflows.
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
SamplingSteps = Annotated[int, Field(ge=1, le=10_000)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]  # of a side
Frames = Annotated[int, Field(ge=1, le=4096)]  # of a video
GuidanceScale = Annotated[float, Field(ge=0, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Updates = Annotated[int, Field(ge=1, le=1000)]  # in one step
NAME = r"^[A-Za-z0-9][\w.-]*$"


class PlainValues(BaseModel):
    """A base of what users write: true and false are no numbers, which pydantic takes for 1 and 0."""

    @model_validator(mode="before")
    @classmethod
    def _check_values(cls, tree: Any) -> Any:
        """Not a validator of each field, which those that tell the members of a union apart cannot have."""
        if isinstance(tree, dict):
            wrong: list[InitErrorDetails] = [
                {"type": PydanticCustomError("plain_value", problem), "loc": (key,), "input": value}
                for key, value in tree.items()
                if key in cls.model_fields and (problem := cls.problem_of(key, value)) is not None
            ]
            if wrong:
                raise ValidationError.from_exception_data(cls.__name__, wrong)
        return tree

    @classmethod
    def problem_of(cls, key: str, value: Any) -> LiteralString | None:
        """What is wrong with a value before its conversion to the field's type."""
        types = set(_leaves(cls.model_fields[key].annotation))
        if types & {int, float} and bool not in types and any(isinstance(each, bool) for each in _leaf_values(value)):
            return "expected a number, not true or false"
        return None


class Settings(PlainValues):
    """A section: unknown keys, infinities, NaN and empty text are refused; assignments are checked too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)

    @classmethod
    def problem_of(cls, key: str, value: Any) -> LiteralString | None:
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(each, str) and not each.strip() for each in texts):
            return "empty text; give a value, or leave it out"
        return super().problem_of(key, value)


def _leaves(annotation: Any) -> list[Any]:
    """The types in an annotation, those within lists, unions and the like included."""
    return [leaf for part in get_args(annotation) for leaf in _leaves(part)] or [annotation]


def _leaf_values(value: Any) -> list[Any]:
    """A value, or the values in a list or mapping."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in _leaf_values(each)] if isinstance(value, list | tuple) else [value]
