"""The sampling defaults of a model: ``fewstep.json`` in its folder."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from fewstep.config.base import Fraction, Frames, GuidanceScale, Pixels, PlainValues, SamplingSteps
from fewstep.config.explain import explain
from fewstep.core.samplers import Sampler
from fewstep.errors import UserError
from fewstep.models.components import load_component
from fewstep.models.family import resolve_any_family
from fewstep.models.file_kinds import describe_file
from fewstep.models.fingerprint import path_fingerprint
from fewstep.models.moved import find_moved, stored_path

GENERATION_CONFIG = "fewstep.json"


class GenerationConfig(PlainValues):
    """Sampling defaults of a model. diffusers does not read them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: SamplingSteps = Field(
        50, description="Number of steps that it was trained for, or gives the best images with."
    )
    step_counts: list[SamplingSteps] | None = Field(
        None, description="All numbers of steps that it was trained for, if there are several."
    )
    guidance_scale: GuidanceScale = Field(0.0, description="Guidance g in cond + g (cond - null); 0 is none.")
    guidance_distilled: bool = Field(False, description="Guidance is distilled into the weights: g must be 0.")
    sigmas: list[float] | None = Field(None, description="Its sigmas, from 1 down to the terminal 0.")
    sampler: Sampler = Field("euler", description='"euler", or "sde": fresh noise in each step.')
    eta: Fraction = Field(1.0, description="Share of fresh noise in each step of the sde sampler.")
    step_loras: bool = Field(False, description="Each step has a LoRA of its own, in step_loras/.")
    system_prompt: str = Field("", description="System prompt; empty is none.")
    teacher: str | None = Field(None, description="The model it was distilled from: a folder, hub id or bundled name.")
    teacher_fingerprint: str | None = Field(None, description="Of a teacher in a folder: recognizes it after a move.")
    height: Pixels = Field(1024, description="Pixels.")
    width: Pixels = Field(1024, description="Pixels.")
    frames: Frames = Field(1, description="Frames of a video; 1 is an image.")

    @property
    def size(self) -> tuple[int, int, int]:
        """Height and width in pixels, and frames."""
        return self.height, self.width, self.frames

    @field_validator("sigmas")
    @classmethod
    def _with_terminal_zero(cls, sigmas: list[float] | None) -> list[float] | None:
        """Completes a list without the terminal 0, as earlier versions wrote it."""
        if sigmas is None or (sigmas and sigmas[-1] == 0):
            return sigmas
        return [*sigmas, 0.0]

    @model_validator(mode="after")
    def _check_sigmas(self) -> Self:
        sigmas = self.sigmas
        if sigmas is None:
            if self.step_loras:
                raise ValueError("step_loras: sigmas is missing; they say which step has which LoRA")
            return self
        if sigmas[0] != 1 or any(high <= low for high, low in pairwise(sigmas)):
            raise ValueError(f"sigmas {sigmas}: expected noise levels that descend from 1 to 0")
        if len(sigmas) != self.steps + 1:
            raise ValueError(f"sigmas: {len(sigmas)} levels with steps {self.steps}; expected one more than steps")
        return self

    def dump(self, folder: Path) -> str:
        """The text of ``fewstep.json`` in a folder; a teacher in another folder is named by the path from there."""
        stored = None if self.teacher is None else stored_path(self.teacher, folder)
        known = self.teacher_fingerprint
        if self.teacher is not None and stored is not None and stored != self.teacher:
            known = path_fingerprint(Path(self.teacher).expanduser())
        content = self.model_copy(update={"teacher": stored, "teacher_fingerprint": known})
        return content.model_dump_json(indent=2) + "\n"


def load_generation_config(folder: Path) -> GenerationConfig:
    """``fewstep.json``; for a folder written by other programs, what the family infers, with a warning.

    Raises:
        UserError: the file cannot be read, or a value in it is invalid.
    """
    file = folder / GENERATION_CONFIG
    if not file.exists():
        return _infer_generation_config(folder)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        config = GenerationConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, tree, GenerationConfig)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {describe_file(file) or f'cannot be read ({error})'}") from None
    if config.teacher is None:
        return config
    return config.model_copy(update={"teacher": find_moved(config.teacher, folder, config.teacher_fingerprint)})


def _infer_generation_config(folder: Path) -> GenerationConfig:
    family = resolve_any_family(folder)
    components = {"scheduler": load_component(folder, "scheduler", family=family)}
    config, model = family.infer_generation_config(components, folder)
    warnings.warn(
        f"{folder}: no {GENERATION_CONFIG}; by its shift of {family.shift(components):g} this is a {model} model: "
        f"the defaults are {config.steps} steps and guidance_scale {config.guidance_scale:g}",
        stacklevel=3,
    )
    return config
