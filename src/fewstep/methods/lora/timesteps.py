"""The noise levels of flow matching on real images, and the weights of their losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.config.lora_recipe import TimestepSettings
from fewstep.core import flow

#: The mean of ``exp(-2 (sigma - 1/2)^2) - exp(-1/2)`` over sigma in [0, 1].
_MEAN_BELL = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - math.exp(-0.5)


def draw_sigma(settings: TimestepSettings, count: int, shift: float, device: torch.device | str = "cpu") -> Tensor:
    """Noise levels [count] of the distribution.

    Args:
        shift: of the model's sampler.
    """
    if settings.distribution == "sigmoid":
        return torch.sigmoid(torch.randn(count, device=device))
    u = torch.rand(count, device=device)
    if settings.distribution == "shift":
        return flow.shift_sigma(u, shift if settings.shift is None else settings.shift)
    return u


def loss_weight(settings: TimestepSettings, sigma: Tensor) -> Tensor:
    """The weight [B] of the losses at sigma [B]; 1 but for the distribution "weighted".

    That one is a bell, ``exp(-2 (sigma - 1/2)^2)`` less its value at 0 and 1, with a mean of 1 over sigma: the weights
    of ai-toolkit's linear timesteps (``toolkit/samplers/custom_flowmatch_sampler.py``).
    """
    if settings.distribution != "weighted":
        return torch.ones_like(sigma)
    return (torch.exp(-2 * (sigma - 0.5).square()) - math.exp(-0.5)) / _MEAN_BELL
