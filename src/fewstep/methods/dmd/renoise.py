"""Renoise schedules: the noise levels sigma_CA and sigma_DM at which the student's samples are scored.

Decoupled-DMD (arXiv 2511.22677): CFG augmentation works at levels cleaner than the student's input, distribution
matching at all levels. Levels are drawn before the shift and shifted afterwards: bound first, then shift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core import flow

Schedule = Literal["shared", "full", "constrained", "hybrid"]


@dataclass(frozen=True)
class Renoise:
    """Draws sigma_CA and sigma_DM.

    ========== ========== =============================
    schedule   u_CA       u_DM
    ========== ========== =============================
    shared     U(0, 1)    the same draw (plain DMD)
    full       U(0, 1)    U(0, 1), independent
    constrained U(0, u_a) U(0, u_a), independent
    hybrid     U(0, u_a)  U(0, 1)
    ========== ========== =============================

    Attributes:
        schedule: a row of the table; ``u_a`` is the anchor.
        shift: shift of the model's noise levels.
        low, high: sigmas are clamped to [low, high] after the shift.
        dm_levels: turns the uniform draws of u_DM, and those of the fake score's loss, into others in [0, 1].
    """

    schedule: Schedule
    shift: float
    low: float = 0.02
    high: float = 0.98
    dm_levels: Callable[[Tensor], Tensor] = lambda u: u

    def sample_sigmas(self, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """(sigma_CA, sigma_DM), each [B], for the pre-shift anchors [B] of the student's inputs."""
        bound_ca = anchor if self.schedule in ("constrained", "hybrid") else torch.ones_like(anchor)
        bound_dm = anchor if self.schedule == "constrained" else torch.ones_like(anchor)
        u_ca = torch.rand_like(anchor)
        if self.schedule == "shared":
            u_ca = u_dm = self.dm_levels(u_ca)
        else:
            u_dm = self.dm_levels(torch.rand_like(anchor))
        return self.sigma(u_ca * bound_ca), self.sigma(u_dm * bound_dm)

    def sample_sigma(self, x: Tensor, highest: float = 1.0) -> Tensor:
        """One sigma for each sample of ``x`` [B, ...]: u ~ U(0, highest), shifted and clamped, [B]."""
        return self.sigma(highest * torch.rand_like(x.flatten(1)[:, 0]))

    def sample_fake_sigma(self, x: Tensor) -> Tensor:
        """As :meth:`sample_sigma`, for the fake score's loss: with the levels of DM."""
        return self.sigma(self.dm_levels(torch.rand_like(x.flatten(1)[:, 0])))

    def sigma(self, u: Tensor) -> Tensor:
        """Pre-shift levels -> sigmas, shifted and clamped."""
        return flow.shift_sigma(u, self.shift).clamp(self.low, self.high)
