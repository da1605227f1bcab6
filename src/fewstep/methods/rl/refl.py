"""Reward feedback learning (ReFL, arXiv 2304.05977): the gradient of a differentiable reward at the student's output.

DMDR (arXiv 2511.13649) adds it to distribution matching: ``L = L_DMD + sum_r weight_r relu(margin_r - r(decode(x)))``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.precision import without_autocast


class Goal(NamedTuple):
    """What a reward counts in a loss.

    Attributes:
        weight: of its shortfall.
        margin: a score from which on there is nothing to gain; None is no such score.
    """

    weight: float
    margin: float | None = None


def shortfall(scores: Mapping[str, Tensor], goals: Mapping[str, Goal]) -> Tensor:
    """``sum_r weight_r relu(margin_r - score_r)`` of each sample, or ``-weight_r score_r`` without a margin: [B].

    A score that is NaN counts nothing and has no gradient.

    Args:
        scores: name -> [B], with or without gradient.
        goals: by the same names.
    """
    parts = []
    for name, (weight, margin) in goals.items():
        lacking = (0.0 if margin is None else margin) - scores[name]
        lacking = torch.nan_to_num(lacking, nan=0.0)
        parts.append(weight * (lacking if margin is None else lacking.relu()))
    return torch.stack(parts).sum(dim=0)


def output_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The value of ``loss`` at ``x`` and its gradient there, both detached and in fp32, without autocast.

    What ``loss`` keeps for its backward pass is free again before the student's own backward pass begins: the two are
    never in memory together.
    """
    with torch.enable_grad(), without_autocast(x.device):
        inner = x.detach().float().requires_grad_(True)
        value = loss(inner)
        (gradient,) = torch.autograd.grad(value, inner)
    return value.detach(), gradient


def with_output_gradient(x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """A scalar equal to ``value`` whose gradient with respect to ``x`` is ``gradient``."""
    linear = (x * gradient).sum()
    return value + linear - linear.detach()
