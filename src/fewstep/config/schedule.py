"""Schedules in recipes: a number, or a mapping with its kind, over the steps of a training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from fewstep.config.base import Settings
from fewstep.core import schedules


def _check_step(value: Any) -> Any:
    if isinstance(value, str) and value.isdigit():  # a key of a JSON mapping
        return int(value)
    if isinstance(value, str):
        share = value.removesuffix("%")
        if share == value or not share.replace(".", "", 1).isdigit() or float(share) > 100:
            raise ValueError("a step is a number, or a share of the steps such as 85%")
    elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a step is a number from 0, or a share of the steps such as 85%")
    return value


#: A number of finished steps, or a share of ``train.steps`` such as "85%".
Step: TypeAlias = Annotated[int | str, BeforeValidator(_check_step)]
Value: TypeAlias = Annotated[float, Field(ge=0)]


def resolve_step(step: int | str, total: int) -> int:
    """The number of finished steps; ``total`` is ``train.steps``."""
    return step if isinstance(step, int) else round(float(step.removesuffix("%")) / 100 * total)


class ConstantSettings(Settings):
    """One value for all steps."""

    kind: Literal["constant"] = "constant"
    value: Value

    @property
    def is_on(self) -> bool:
        """Whether it is positive at any step."""
        return self.value > 0

    @model_serializer
    def _as_number(self) -> float:
        return self.value

    def resolve(self, total: int) -> schedules.Schedule:
        return schedules.Constant(self.value)


class RampSettings(Settings):
    """A linear or half-cosine ramp; constant before and after."""

    kind: Literal["linear", "cosine"]
    start: Value = Field(0.0, description="Value up to first_step.")
    end: Value = Field(1.0, description="Value from last_step on.")
    first_step: Step = Field(0, description="Step at which the ramp begins.")
    last_step: Step = Field("100%", description="Step at which the ramp ends.")

    @property
    def is_on(self) -> bool:
        """Whether it is positive at any step."""
        return max(self.start, self.end) > 0

    def resolve(self, total: int) -> schedules.Schedule:
        first, last = resolve_step(self.first_step, total), resolve_step(self.last_step, total)
        if last <= first:
            raise ValueError(f"last_step {last} is not after first_step {first}, of {total} steps")
        return schedules.Ramp(self.start, self.end, first, last, cosine=self.kind == "cosine")


class PiecewiseSettings(Settings):
    """Piecewise constant: each value holds from its step on."""

    kind: Literal["piecewise"]
    values: dict[Step, Value] = Field(description="Step -> value from there on; the first step is 0.")

    @model_validator(mode="after")
    def _starts_at_0(self) -> PiecewiseSettings:
        if 0 not in self.values:
            raise ValueError("a piecewise schedule needs a value for step 0")
        return self

    @property
    def is_on(self) -> bool:
        """Whether it is positive at any step."""
        return any(value > 0 for value in self.values.values())

    def resolve(self, total: int) -> schedules.Schedule:
        return schedules.Piecewise({resolve_step(step, total): value for step, value in self.values.items()})


def _number_as_constant(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"kind": "constant", "value": value}
    if isinstance(value, dict | Settings):
        return value
    raise ValueError("expected a number, or a mapping with kind: linear, cosine or piecewise")


#: A weight: a number, or how it changes over the steps.
Weight: TypeAlias = Annotated[
    Annotated[ConstantSettings | RampSettings | PiecewiseSettings, Field(discriminator="kind")],
    BeforeValidator(_number_as_constant),
]
