"""From noise to data: ``sample_*(denoiser, x, sigmas, prompts)``.

``sigmas`` runs from the level of ``x`` down, without the final 0, which every sampler goes on to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser

Callback = Callable[[int], object]


def euler_step(x: Tensor, sigma: float, following: float, velocity: Tensor) -> Tensor:
    """One Euler step along the flow's ordinary differential equation."""
    return x + (following - sigma) * velocity


def sde_step(x: Tensor, sigma: float, following: float, velocity: Tensor, noise: Tensor, eta: float = 1.0) -> Tensor:
    """Predict the data, and bring it to the next level with noise of which a part is fresh.

    ``x' = (1 - s') x0 + s' [cos(eta pi/2) eps + sin(eta pi/2) noise]``, where eps is the noise that the velocity speaks
    of. The coefficients of data and noise stay what the level asks for at every eta ("coefficient-preserving",
    arXiv 2509.05952); 0 is Euler's step, 1 takes fresh noise alone.
    """
    x0 = flow.x0_from_velocity(x, sigma, velocity)
    angle = eta * math.pi / 2
    return flow.add_noise(x0, following, math.cos(angle) * (x0 + velocity) + math.sin(angle) * noise)


def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    prompts: EncodedPrompts,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method: deterministic; what ``FlowMatchEulerDiscreteScheduler`` does.

    Args:
        x: [B, C, H, W] at ``sigmas[0]``; pure noise where that is 1.
        callback: called with the number of each step that was done.

    Returns:
        [B, C, H, W], data.
    """
    levels = [*sigmas, 0.0]
    for index, sigma in enumerate(sigmas):
        velocity = denoiser(x, torch.full((len(x),), sigma, device=x.device), prompts)
        x = euler_step(x, sigma, levels[index + 1], velocity)
        if callback is not None:
            callback(index)
    return x


def sample_sde(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    prompts: EncodedPrompts,
    callback: Callback | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    eta: float = 1.0,
) -> Tensor:
    """Data is predicted at each level and brought to the next with fresh noise (consistency models, arXiv 2303.01469,
    algorithm 1; DMD2, arXiv 2405.14867, section 4.4).

    Args and returns as :func:`sample_euler`; ``noise(x)`` gives noise of its argument's shape; ``eta`` in [0, 1] is how
    much of the noise is fresh at each step.
    """
    levels = [*sigmas, 0.0]
    for index, sigma in enumerate(sigmas):
        velocity = denoiser(x, torch.full((len(x),), sigma, device=x.device), prompts)
        following = levels[index + 1]
        fresh = noise(x) if following > 0 else torch.zeros_like(x)
        x = sde_step(x, sigma, following, velocity, fresh, eta)
        if callback is not None:
            callback(index)
    return x
