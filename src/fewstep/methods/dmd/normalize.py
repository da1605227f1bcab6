"""DMD's per-sample normalization and its pseudo-target loss."""

from __future__ import annotations

from torch import Tensor


def dmd_weight(x0_teacher: Tensor, x0: Tensor, eps: float) -> Tensor:
    """``mean|x0_teacher - x0|`` of each sample, at least ``eps``: [B, 1, ..., 1] (DMD, arXiv 2311.18828, eq. 8)."""
    return (x0_teacher - x0).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True).clamp(min=eps)


def pseudo_target_loss(x0: Tensor, delta: Tensor) -> Tensor:
    """``1/2 ||x0 - stop_gradient(x0 + delta)||^2``, mean over elements: its gradient is ``-delta`` over their number.

    FastGen calls it the VSD loss.
    """
    return 0.5 * (x0 - (x0 + delta).detach()).square().mean()
