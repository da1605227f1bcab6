"""Backward simulation: the student's own way from pure noise down to an anchor (DMD2, arXiv 2405.14867, section 4.5).

What the student meets here is what it will meet when it generates: never a real image with noise on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.samplers import euler_step, sde_step

Sampler = Literal["euler", "sde"]
AnchorSchedule = Literal["fixed", "continuous"]

LOWEST = 0.01  # of a drawn level: below it there is nothing left to predict


def sample_rollout_timesteps(anchors: Sequence[float], schedule: AnchorSchedule) -> list[float]:
    """The pre-shift levels that a rollout visits, the last of which is where the student is trained.

    "fixed": the first of the student's own anchors, as many as a draw says. "continuous": as many levels, but only the
    first is 1; the others are drawn from U(0, 1) and sorted (the dynamic schedule of CDM, arXiv 2605.06376, section 3).
    """
    count = int(torch.randint(len(anchors), ())) + 1
    if schedule == "fixed":
        return list(anchors[:count])
    drawn = torch.rand(count - 1).clamp(min=LOWEST).sort(descending=True).values
    return [1.0, *drawn.tolist()]


@torch.no_grad()
def backward_simulation(
    student: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    prompts: EncodedPrompts,
    sampler: Sampler = "euler",
    eta: float = 1.0,
) -> Tensor:
    """The student's input at the last of ``sigmas``, reached by its own steps from ``noise``.

    Args:
        noise: [B, C, ..., H, W], pure noise.
        sigmas: noise levels from 1 down to the one that is wanted; a single one returns the noise.
        sampler, eta: how the student is run at inference; the same steps as in ``samplers``.

    Returns:
        [B, C, ..., H, W] at ``sigmas[-1]``.
    """
    x = noise
    for index in range(len(sigmas) - 1):
        sigma = torch.full((len(x),), sigmas[index], device=x.device)
        velocity = student(x, sigma, prompts)
        if sampler == "sde":
            x = sde_step(x, sigmas[index], sigmas[index + 1], velocity, torch.randn_like(x), eta)
        else:
            x = euler_step(x, sigmas[index], sigmas[index + 1], velocity)
    return x
