"""The base of all sections of recipes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fewstep.core.seeds import MAX_SEED

Fraction = Annotated[float, Field(ge=0, le=1)]

# Ranges of what reaches torch, so that a slip of the pen is refused before it fills the memory or overflows.
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
SamplingSteps = Annotated[int, Field(ge=1, le=10_000)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]  # of a side
GuidanceScale = Annotated[float, Field(ge=0, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Updates = Annotated[int, Field(ge=1, le=1000)]  # in one step
NAME = r"^[A-Za-z0-9][\w.-]*$"


class Settings(BaseModel):
    """A section: unknown keys, infinities and NaN are refused; assignments are checked too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)
