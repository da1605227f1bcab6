"""DMDR's cold start (arXiv 2511.13649): two schedules for the steps in which student and teacher hardly overlap.

DynaRS, dynamic renoise sampling: distribution matching begins at high noise levels, where the two overlap.
DynaDG, dynamic distribution guidance: the real score begins as the teacher with half of the fake score's adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config.base import Fraction, Settings
from fewstep.config.schedule import Step, resolve_step
from fewstep.core.schedules import Ramp

_GRID = 4096  # points at which a Beta distribution is tabulated


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """The inverse of the distribution function of Beta(a, b), to about 1e-6: uniform draws become draws from it.

    Args:
        u: in [0, 1], any shape.
        a, b: at least 1.
    """
    if a == b == 1:
        return u
    grid = torch.linspace(0, 1, _GRID + 1, dtype=torch.float64)
    density = grid.pow(a - 1) * (1 - grid).pow(b - 1)
    cumulative = torch.cat([grid.new_zeros(1), torch.cumulative_trapezoid(density, grid)])
    cumulative = (cumulative / cumulative[-1]).to(u.device)
    target = u.double().contiguous()
    above = torch.searchsorted(cumulative, target).clamp(1, _GRID)
    low, high = cumulative[above - 1], cumulative[above]
    return ((above - 1 + (target - low) / (high - low).clamp(min=1e-300)) / _GRID).to(u.dtype)


@dataclass
class DynaRS:
    """Draws levels ``u ~ Beta(a, b)`` before the shift, in place of U(0, 1); 1 is noise. Both parameters fall to 1.

    Attributes:
        step: finished steps, set before each.
    """

    a: Ramp
    b: Ramp
    step: int = field(default=0)

    def __call__(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1] -> levels."""
        return beta_quantile(u, self.a(self.step), self.b(self.step))


def guidance_share(step: int, start: float, steps: int) -> float:
    """The scale of the fake score's adapter in the real score: ``start / 2 (1 + cos(pi step / steps))``, 0 from
    ``steps`` on."""
    return 0.5 * start * (1 + math.cos(math.pi * step / steps)) if step < steps else 0.0


class DynaRSSettings(Settings):
    """DynaRS: distribution matching and the fake score's loss begin at high noise levels."""

    a: Annotated[float, Field(ge=1, le=100)] = Field(4.0, description="First parameter of Beta(a, b) at step 0.")
    b: Annotated[float, Field(ge=1, le=100)] = Field(1.5, description="Second parameter of Beta(a, b) at step 0.")
    steps: Step = Field("100%", description="Steps until both are 1, which is uniform; a half cosine.")

    def resolve(self, total: int) -> DynaRS:
        """Raises: ValueError if it lasts no step."""
        last = resolve_step(self.steps, total)
        if last < 1:
            raise ValueError("method.renoise.dyna_rs.steps: it must last at least 1 step; leave dyna_rs out")
        return DynaRS(Ramp(self.a, 1.0, 0, last, cosine=True), Ramp(self.b, 1.0, 0, last, cosine=True))


class DynaDGSettings(Settings):
    """DynaDG: the real score begins between teacher and fake score; it needs models.train: lora."""

    scale: Fraction = Field(0.5, description="Scale of the fake score's adapter in the real score at step 0.")
    steps: Step = Field("100%", description="Steps until it is 0; a half cosine.")
