"""The preference of a group, learned by a surrogate denoiser (TDM-R1, arXiv 2603.07700)."""

from __future__ import annotations

import torch
from torch import Tensor


def denoising_error(velocity: Tensor, target: Tensor) -> Tensor:
    """``mean |target - velocity|^2`` of each sample, in fp32: [B].

    Args:
        velocity, target: [B, C, ..., H, W].
    """
    return (target.float() - velocity.float()).square().flatten(1).mean(dim=1)


def surrogate_loss(
    error: Tensor,
    reference: Tensor,
    recent: Tensor,
    advantages: Tensor,
    size: int,
    *,
    beta: float,
    clip: float,
    pull: float,
) -> Tensor:
    """``sum_i sg(sigmoid(s)) A_i d_i + pull (d_i - d_i_ref)^2`` with ``s = beta / |G| sum_i A_i (d_i - d_i_ref)``, as a
    mean over samples: a scalar.

    Where the surrogate prefers what the group's scores prefer, ``s`` falls and with it the weight. A sample whose
    ratio ``exp(recent - error)`` has moved by more than ``clip`` to the side of its advantage has the pull's gradient
    alone. The samples of a group have one noise level and one noise.

    Args:
        error, reference, recent: [B], denoising errors of the surrogate (with gradient), the reference, and a fast
            moving average of the surrogate.
        advantages: [B]; all 0 give no gradient but the pull's.
        size: samples of a group, in a row.
    """
    gained = (advantages * (error - reference)).detach().unflatten(0, (-1, size)).mean(dim=1, keepdim=True)
    weight = torch.sigmoid(beta * gained).expand(-1, size).flatten()
    ratio = (recent - error).detach().exp()
    moved = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
    preferred = weight * advantages * error
    return (torch.where(moved, 0.0, preferred) + pull * (error - reference).square()).mean()
