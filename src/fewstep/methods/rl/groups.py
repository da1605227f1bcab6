"""Groups of samples of one prompt: what is better than its group, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.rewards.moments import Reduce


def group_advantages(
    scores: Tensor, size: int, *, floor: float, bound: float = 5.0, reduce: Reduce = lambda tensor: tensor
) -> Tensor:
    """``(score - mean of its group) / max(deviation of all scores, floor)``, at most ``bound`` in magnitude: [B].

    Mean per prompt and one deviation for all (Flow-GRPO, arXiv 2505.05470, and RTDMD, arXiv 2605.26108): a group whose
    scores hardly differ gets small advantages, and one whose scores are equal gets none. A score that is NaN has
    advantage 0 and does not count.

    Args:
        scores: [B], B a multiple of ``size``; every ``size`` in a row are one group, whole on this process.
        floor: least deviation that is divided by, in the scores' units.
        reduce: sums over processes, so that the deviation is that of all their scores.
    """
    groups = scores.detach().float().unflatten(0, (-1, size))
    scored = ~groups.isnan()
    values = groups.nan_to_num(nan=0.0)
    mean = values.sum(dim=1, keepdim=True) / scored.sum(dim=1, keepdim=True).clamp(min=1)
    exact = values.double()
    count, total, squares = reduce(torch.stack([scored.sum().double(), exact.sum(), exact.square().sum()])).unbind()
    count = count.clamp(min=1)
    deviation = (squares / count - (total / count).square()).clamp(min=floor**2).sqrt()
    advantages = torch.where(scored, values - mean, 0.0) / deviation.float()
    return advantages.clamp(-bound, bound).flatten()


def drop_flat_groups(scores: Tensor, size: int, least: float) -> Tensor:
    """The scores [B], NaN in groups whose standard deviation is below ``least``: there is nothing to prefer in them,
    and they should not lower the deviation that others are divided by.

    Args:
        scores: [B]; every ``size`` in a row are one group.
    """
    groups = scores.unflatten(0, (-1, size))
    flat = groups.std(dim=1, correction=0, keepdim=True) < least
    return groups.masked_fill(flat, torch.nan).flatten()


def later_advantages(
    scores: Tensor,
    usable: Sequence[bool],
    index: int,
    size: int,
    *,
    least: float,
    floor: float,
    bound: float,
    reduce: Reduce = lambda tensor: tensor,
) -> Tensor:
    """The advantages [B] of a rollout's step: those of the mean score of the usable states from the one it leads to on.

    Args:
        scores: [steps, B], of the state after each step.
        usable: by step. Without a usable state all advantages are 0.
        index: of the step.
        size, least: of the groups, and their least deviation, as in :func:`drop_flat_groups`.
        floor, bound, reduce: as in :func:`group_advantages`.
    """
    later = [scores[at] for at in range(index, len(scores)) if usable[at]]
    if not later:
        return torch.zeros_like(scores[index])
    mean = drop_flat_groups(torch.stack(later).mean(dim=0), size, least)
    return group_advantages(mean, size, floor=floor, bound=bound, reduce=reduce)
