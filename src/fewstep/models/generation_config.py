"""How a model is sampled by default: ``fewstep.json`` in its folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fewstep.core.samplers import Sampler
from fewstep.errors import UserError
from fewstep.models.components import load_component

GENERATION_CONFIG = "fewstep.json"


TURBO_SHIFT = 3  # of Z-Image-Turbo's noise levels; Z-Image's is 6


class GenerationConfig(BaseModel):
    """How a model wants to be run: ``fewstep.json`` in its folder. diffusers does not read it."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(50, ge=1, description="Steps it was trained for, or is best sampled with.")
    guidance_scale: float = Field(0.0, ge=0, description="Best guidance as in cond + g (cond - null); 0 is none.")
    guidance_distilled: bool = Field(False, description="Guidance is inside already: more of it over-bakes.")
    sigmas: list[float] | None = Field(None, description="Its sigmas, falling from 1 to the terminal 0.")
    sampler: Sampler = Field("euler", description='"euler", or "sde": fresh noise in each step.')
    eta: float = Field(1.0, ge=0, le=1, description="Share of fresh noise in each step of the sde sampler.")
    system_prompt: str = Field("", description="The system's turn before every prompt; empty is none.")
    teacher: str | None = Field(None, description="The model it was made from: a folder, or a shipped one's name.")
    height: int = Field(1024, ge=1, description="Pixels.")
    width: int = Field(1024, ge=1, description="Pixels.")

    @field_validator("sigmas")
    @classmethod
    def _with_terminal_zero(cls, sigmas: list[float] | None) -> list[float] | None:
        """Completes a list without the terminal 0, as earlier versions wrote it."""
        if sigmas is None or (sigmas and sigmas[-1] == 0):
            return sigmas
        return [*sigmas, 0.0]


def load_generation_config(folder: Path) -> GenerationConfig:
    """``fewstep.json``; of a folder that others wrote, how its like is run, with a warning.

    Raises:
        UserError: the file says what it cannot mean.
    """
    file = folder / GENERATION_CONFIG
    if not file.exists():
        return _infer_generation_config(folder)
    try:
        return GenerationConfig.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{file}: {wrong}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise UserError(f"{file}: {error}") from error


def _infer_generation_config(folder: Path) -> GenerationConfig:
    """A folder whose noise levels have Z-Image-Turbo's shift is taken for a model of its kind, any other for one of
    Z-Image's."""
    shift = load_component(folder, "scheduler").config["shift"]
    card, kind = GenerationConfig(guidance_scale=4.0), "Z-Image"
    if shift == TURBO_SHIFT:
        card, kind = GenerationConfig(steps=8), "Z-Image-Turbo"
    warnings.warn(
        f"{folder}: no {GENERATION_CONFIG}; by its shift of {shift:g} it is run like {kind}, "
        f"with {card.steps} steps and guidance "
        f"{card.guidance_scale:g} where nothing else is said",
        stacklevel=3,
    )
    return card
