"""The spear: CFG augmentation, the engine that turns a multi-step model into a few-step one.

Decoupled-DMD (arXiv 2511.22677): the direction that guidance would add, at the student's images.
"""

from __future__ import annotations

from torch import Tensor


def cfg_augmentation(x0_cond: Tensor, x0_null: Tensor, alpha: float) -> Tensor:
    """``(alpha - 1) (x0_teacher(prompt) - x0_teacher(null))``, to be added to the student's images.

    Args:
        x0_cond, x0_null: [B, C, H, W], the teacher's data predictions at ``x_CA`` with the prompt and the null prompt.
        alpha: guidance as in ``null + alpha (cond - null)``; at 1 there is nothing to add.
    """
    return (alpha - 1) * (x0_cond - x0_null)
