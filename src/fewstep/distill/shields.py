"""Shields: what keeps the spear from over-baking the student's images."""

from __future__ import annotations

from torch import Tensor


def distribution_matching(x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """``x0_teacher(prompt) - x0_fake(prompt)`` at ``x_DM``: from where the student's images are denser than the
    teacher's to where they are rarer (DMD, arXiv 2311.18828, eq. 7; the DM term of arXiv 2511.22677).

    Args:
        x0_teacher, x0_fake: [B, C, H, W], data predictions of both at the same noisy images.
    """
    return x0_teacher - x0_fake
