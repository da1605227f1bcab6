"""The straight path between data and noise, as pure functions.

``sigma`` is 1 at noise and 0 at data: ``x_sigma = (1 - sigma) x0 + sigma eps`` and ``velocity = eps - x0``
(rectified flow, arXiv 2209.03003, with time reversed). Tensors are [B, ...]; ``sigma`` is [B] or a float.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def append_dims(sigma: Tensor | float, like: Tensor) -> Tensor:
    """``sigma`` [B] or a float, shaped to multiply ``like`` [B, ...]."""
    sigma = torch.as_tensor(sigma, dtype=like.dtype, device=like.device)
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, sigma: Tensor | float, eps: Tensor) -> Tensor:
    """The state at noise level ``sigma``: ``(1 - sigma) x0 + sigma eps``."""
    sigma = append_dims(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def x0_from_velocity(x: Tensor, sigma: Tensor | float, velocity: Tensor) -> Tensor:
    """The data prediction of a velocity at ``x``: ``x - sigma * velocity``."""
    return x - append_dims(sigma, x) * velocity


def velocity_from_x0(x: Tensor, sigma: Tensor | float, x0: Tensor) -> Tensor:
    """The velocity at ``x`` of a data prediction: ``(x - x0) / sigma``, for sigma > 0."""
    return (x - x0) / append_dims(sigma, x)


def shift_sigma(u: Number, shift: float) -> Number:
    """``S(u) = s u / (1 + (s - 1) u)``: moves noise levels towards noise for s > 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Number, shift: float) -> Number:
    """The inverse of :func:`shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def uniform_timesteps(steps: int) -> list[float]:
    """``steps`` evenly spaced pre-shift noise levels, from 1 down, without the terminal 0: ``1, (n-1)/n, ..., 1/n``."""
    return [1 - i / steps for i in range(steps)]


def sigmas_from_timesteps(timesteps: Iterable[float], shift: float) -> list[float]:
    """Pre-shift noise levels -> the shifted sigmas of a sampler, with their terminal 0."""
    return [*(shift_sigma(u, shift) for u in timesteps), 0.0]


def get_sigmas(steps: int, shift: float) -> list[float]:
    """The shifted sigmas of ``steps`` steps, from 1 to the terminal 0: ``steps + 1`` numbers.

    For 8 steps and shift 3 it is Z-Image-Turbo's schedule: 1, .9545, .9, .8333, .75, .6429, .5, .3, 0.
    """
    return sigmas_from_timesteps(uniform_timesteps(steps), shift)
