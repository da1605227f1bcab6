"""Losses of a discriminator: for real samples it should be positive, for generated ones negative."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Literal["hinge", "logistic"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: Loss) -> Tensor:
    """``relu(1 - D(real)) + relu(1 + D(fake))``, or with softplus and no margin, as a mean of each sample: [B].

    Every logit has its own loss: a token cannot make up for another.

    Args:
        real, fake: [B, heads, L].
    """
    hinge = kind == "hinge"
    each = F.relu(1 - real) + F.relu(1 + fake) if hinge else F.softplus(-real) + F.softplus(fake)
    return each.float().mean(dim=(1, 2))


def gradient_penalty(real: Tensor, perturbed: Tensor) -> Tensor:
    """``(D(real) - D(real + noise))^2`` of each sample [B]: R1 by finite differences, without second derivatives
    (APT, arXiv 2501.08316, eq. 4).

    Args:
        real, perturbed: [B, heads, L].
    """
    return (real - perturbed).float().square().mean(dim=(1, 2))
