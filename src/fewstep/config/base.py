"""The base of all sections of recipes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
NAME = r"^[A-Za-z0-9][\w.-]*$"


class Settings(BaseModel):
    """A section: unknown keys, infinities and NaN are refused; assignments are checked too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)
