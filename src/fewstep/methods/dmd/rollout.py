"""Backward simulation: the student's own rollout from pure noise to an anchor (DMD2, arXiv 2405.14867, section 4.5).

The student is trained on the inputs that it has at inference, never on real images with added noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.global_rng import shared_draws
from fewstep.core.samplers import Sampler, iterate, last_state

AnchorSchedule = Literal["fixed", "continuous"]
GradientSteps = Literal["last", "all"]

MIN_TIMESTEP = 0.01  # of random levels: a prediction from below it is nearly the identity


def sample_rollout_timesteps(
    anchors: Sequence[float], schedule: AnchorSchedule, first_step_weight: float = 1.0
) -> list[float]:
    """The pre-shift levels of one rollout, from 1 down; the student is trained at the last of them.

    "fixed": the first k of the student's anchors. "continuous": also k levels, of which only the first is 1; the others
    are drawn from U(0, 1) and sorted (the dynamic schedule of CDM, arXiv 2605.06376, section 3). k is uniform, but that
    k = 1 is ``first_step_weight`` times as likely as each other.
    """
    if first_step_weight == 1 or len(anchors) == 1:
        count = int(torch.randint(len(anchors), ())) + 1
    else:
        later = float(torch.rand(())) * (first_step_weight + len(anchors) - 1) - first_step_weight
        count = 1 if later < 0 else min(int(later) + 2, len(anchors))
    if schedule == "fixed":
        return list(anchors[:count])
    with shared_draws():  # levels of the whole batch, not one for each sample
        drawn = torch.rand(count - 1)
    drawn = drawn.clamp(min=MIN_TIMESTEP).sort(descending=True).values
    return [1.0, *drawn.tolist()]


def backward_simulation(
    student: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    prompts: EncodedPrompts,
    sampler: Sampler = "euler",
    eta: float = 1.0,
    gradient: bool = False,
) -> Tensor:
    """The student's input at the last of ``sigmas``, reached by its own steps from ``noise``.

    Args:
        noise: [B, C, ..., H, W], pure noise.
        sigmas: falling noise levels from 1; a single one returns the noise.
        sampler, eta: those of inference; the steps are those of :func:`fewstep.core.samplers.iterate`.
        gradient: whether it passes through every step, where gradients are recorded at all. Each step's activations are
            then recomputed in the backward pass, so that the memory is that of one step.

    Returns:
        [B, C, ..., H, W] at ``sigmas[-1]``.
    """
    denoiser = _checkpointed(student) if gradient else student
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
        return last_state(noise, iterate(denoiser, noise, sigmas, prompts, sampler=sampler, eta=eta))


def _checkpointed(denoiser: Denoiser) -> Denoiser:
    def call(x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        velocity: Tensor = checkpoint(denoiser, x, sigma, prompts, use_reentrant=False, preserve_rng_state=False)
        return velocity

    return call
