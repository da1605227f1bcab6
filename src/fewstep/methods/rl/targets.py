"""Targets from one step of a reward's gradient, for data predictions (after DiffusionOPSD, arXiv 2608.24646)."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core import flow


def bounded_step(x0: Tensor, gradient: Tensor, radius: float) -> Tensor:
    """``radius |x0| gradient / |gradient|`` of each sample, [B, C, ..., H, W]; 0 where the gradient is 0.

    Args:
        x0: [B, C, ..., H, W], the samples whose norm bounds the step.
        gradient: of the reward at each sample.
        radius: above 0.
    """
    length, norm = (flow.append_dims(torch.linalg.vector_norm(each.flatten(1), dim=1), x0) for each in (gradient, x0))
    return torch.where(length > 0, radius * norm * gradient / length.clamp(min=torch.finfo(x0.dtype).tiny), 0.0)


def target_loss(x0: Tensor, old: Tensor, step: Tensor, beta: float) -> Tensor:
    """``mean (beta (x0 - old) - step)^2``, a scalar; least at ``old + step / beta``.

    In DiffusionOPSD ``beta x0 + (1 - beta) old`` is fitted to ``old + step`` with weight r, and ``(1 + beta) old - beta
    x0`` to ``old - step`` with weight 1 - r. With opposite steps both errors are this one, so that r has no influence.

    Args:
        x0: [B, C, ..., H, W], the student's data prediction, with gradient.
        old, step: the behavior policy's prediction at the same state, and :func:`bounded_step` there.
        beta: above 0.
    """
    return (beta * (x0 - old) - step).square().mean()
