"""Direct preference optimization (DPO, arXiv 2305.18290) on stochastic sampling steps (D3PO, arXiv 2311.13231)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
