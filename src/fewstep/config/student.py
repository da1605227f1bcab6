"""The section ``student`` of a distillation: the student's noise levels, and how it is sampled."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fewstep.config.base import Fraction, Settings
from fewstep.core import flow


class StudentSettings(Settings):
    """The student's noise levels and its sampler."""

    steps: int = Field(default=4, ge=1, le=64, description="Steps of the student.")
    step_counts: list[Annotated[int, Field(ge=1, le=64)]] | None = Field(
        default=None,
        min_length=1,
        description="Numbers of steps that one student is trained for, steps among them: each training step draws one. "
        "[1, 1, 2, 4] draws 1 twice as often as the others. null is steps alone.",
    )
    step_chooser: str | None = Field(
        None,
        min_length=1,
        description="Folder of an earlier student with the predictor of fewstep steps train for step_counts: prompts "
        "that need more steps get more of the training at many. null draws all prompts alike.",
    )
    timesteps: list[Fraction] | None = Field(
        default=None,
        description="The student's noise levels before the shift, descending from 1, without the 0; null spaces them "
        "evenly.",
    )
    timestep_sampling: Literal["fixed", "continuous"] = Field(
        default="fixed",
        description="continuous: every training step draws random levels in place of the timesteps (CDM).",
    )
    sampler: Literal["euler", "sde"] = Field(default="euler", description="How a step reaches the next noise level.")
    eta: Fraction = Field(default=1.0, description="Share of fresh noise in each step of the sde sampler; 0 is Euler.")

    @model_validator(mode="after")
    def _check_timesteps(self) -> StudentSettings:
        if self.sampler == "euler" and self.eta != 1:
            raise ValueError("eta: no effect on the euler sampler; set student.sampler: sde, or leave it out")
        levels, counts = self.timesteps, self.step_counts
        if counts is not None:
            if self.steps not in counts:
                raise ValueError(f"step_counts {counts}: steps ({self.steps}) is not among them")
            if levels is not None or self.timestep_sampling != "fixed":
                raise ValueError("step_counts: its levels are evenly spaced; leave timesteps and timestep_sampling out")
        elif self.step_chooser is not None:
            raise ValueError("step_chooser: no effect on one number of steps; set step_counts, or leave it out")
        if levels is None:
            return self
        falling = all(a > b > 0 for a, b in pairwise([*levels, 0.0]) if b > 0) and levels[-1:] > [0]
        if len(levels) != self.steps or levels[0] != 1 or not falling:
            raise ValueError(f"timesteps {levels}: expected {self.steps} levels that descend from 1, without the 0")
        return self

    @property
    def levels(self) -> list[float]:
        """The pre-shift noise levels, from 1 down, without the 0."""
        return flow.uniform_timesteps(self.steps) if self.timesteps is None else self.timesteps

    @property
    def trained_levels(self) -> list[list[float]]:
        """``levels`` for each number of steps that it is trained for."""
        if self.step_counts is None:
            return [self.levels]
        return [flow.uniform_timesteps(count) for count in self.step_counts]

    @property
    def trajectory_steps(self) -> int:
        """Steps of the student that a cached trajectory has states for: the most that it is trained for."""
        return max(len(levels) for levels in self.trained_levels)

    def check_trajectory(self, what: str) -> None:
        """Raises: ValueError if a cached trajectory has no states at the student's levels: they must be evenly spaced,
        and reached by Euler steps."""
        if self.timesteps is not None or self.sampler != "euler":
            raise ValueError(
                f"{what} needs evenly spaced timesteps and the euler sampler: leave student.timesteps and "
                "student.sampler out"
            )
        most = self.trajectory_steps
        if any(most % len(levels) for levels in self.trained_levels):
            raise ValueError(f"{what} compares states of {most} steps: each of student.step_counts must divide {most}")
