"""Direct preference optimization (DPO, arXiv 2305.18290) on stochastic sampling steps (D3PO, arXiv 2311.13231)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core import flow
from fewstep.core.samplers import SamplerStep, sde_step


def dpo_loss(winner: Tensor, loser: Tensor, winner_ref: Tensor, loser_ref: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(beta [(log p_w - log p_w_ref) - (log p_l - log p_l_ref)])`` of each pair: [P].

    Args:
        winner, loser: [P], log-probabilities under the student, with gradient.
        winner_ref, loser_ref: [P], under the reference.
    """
    return -F.logsigmoid(beta * ((winner - winner_ref) - (loser - loser_ref)))


def best_and_worst(scores: Tensor, size: int, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of each group's best and worst sample, and whether their scores differ by at least ``least``.

    A score that is NaN is neither.

    Args:
        scores: [B]; every ``size`` in a row are one group.

    Returns:
        int64 [B / size] twice, bool [B / size].
    """
    groups = scores.detach().unflatten(0, (-1, size))
    high, best = groups.nan_to_num(nan=-torch.inf).max(dim=1)
    low, worst = groups.nan_to_num(nan=torch.inf).min(dim=1)
    first = torch.arange(len(groups), device=scores.device) * size
    return first + best, first + worst, (high - low >= least) & high.isfinite() & low.isfinite()


def image_steps(x0: Tensor, sigmas: Sequence[float], eta: float, pairs: int) -> list[SamplerStep]:
    """The stochastic steps at the student's levels as they would end in given images: the state is the noised image,
    and its next state is drawn from the step whose data prediction is the image.

    Rows ``i`` and ``i + pairs`` have the same noise, which leaves the difference of their images. The first step is
    left out: pure noise has nothing of an image in it, and a student that is drawn towards images from there averages
    them.

    Args:
        x0: [B, C, ..., H, W], B a multiple of ``pairs``.
        sigmas: the student's noise levels from 1 down, with the terminal 0.
        eta: share of fresh noise.
    """
    made = []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if index == 0 or sigma_next == 0:
            continue
        eps, fresh = (torch.randn_like(x0[:pairs]).repeat(len(x0) // pairs, *[1] * (x0.ndim - 1)) for _ in range(2))
        x, velocity = flow.add_noise(x0, sigma, eps), eps - x0
        step = sde_step(x, sigma, sigma_next, velocity, fresh, eta)
        made.append(SamplerStep(index, sigma, sigma_next, x, velocity, step.x, step.mean, step.std, step.log_prob))
    return made
