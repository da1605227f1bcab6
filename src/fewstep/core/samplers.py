"""Samplers: from noise to data, ``sample_*(denoiser, x, sigmas, prompts)``, and the loop that they share, ``iterate``.

``sigmas`` falls from the level of ``x``; its terminal 0 is part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser

Sampler = Literal["euler", "sde"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

#: ``noise(x)`` returns standard normal noise of the shape of ``x``.
Noise = Callable[[Tensor], Tensor]


class SDEStep(NamedTuple):
    """A stochastic step: ``x`` is drawn from N(mean, std^2).

    Attributes:
        x: [B, ...], the sample.
        mean: [B, ...].
        std: standard deviation of every element; 0 at the terminal step.
        log_prob: [B] in fp32, log-density of ``x`` as the mean over its dimensions; None where ``std`` is 0. ``x``
            counts as a constant in it: its gradient reaches the denoiser through ``mean``.
    """

    x: Tensor
    mean: Tensor
    std: float
    log_prob: Tensor | None


@dataclass(frozen=True)
class SamplerStep:
    """One step of :func:`iterate`.

    Attributes:
        index: number of the step, from 0.
        sigma, sigma_next: noise levels of ``x`` and ``x_next``.
        x, velocity, x_next: [B, C, ..., H, W].
        mean, std, log_prob: as in :class:`SDEStep`; an Euler step is its own mean.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    velocity: Tensor
    x_next: Tensor
    mean: Tensor
    std: float
    log_prob: Tensor | None

    @property
    def x0(self) -> Tensor:
        """The data prediction at ``x``."""
        return flow.x0_from_velocity(self.x, self.sigma, self.velocity)


def euler_step(x: Tensor, sigma: float, sigma_next: float, velocity: Tensor) -> Tensor:
    """One Euler step along the flow's ordinary differential equation."""
    return x + (sigma_next - sigma) * velocity


def sde_mean_std(
    x: Tensor, sigma: float, sigma_next: float, velocity: Tensor, eta: float = 1.0
) -> tuple[Tensor, float]:
    """Mean and standard deviation of the coefficient-preserving stochastic step (arXiv 2509.05952).

    ``mean = (1 - s') x0 + s' cos(eta pi/2) eps`` and ``std = s' sin(eta pi/2)``, with ``x0 = x - s v`` and
    ``eps = x + (1 - s) v``. Data and noise keep the coefficients ``1 - s'`` and ``s'`` of the level at every eta in
    [0, 1]: 0 is Euler's step, 1 replaces all noise.
    """
    x0 = flow.x0_from_velocity(x, sigma, velocity)
    angle = eta * math.pi / 2
    return flow.add_noise(x0, sigma_next, math.cos(angle) * (x0 + velocity)), sigma_next * math.sin(angle)


def normal_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Log-density of N(mean, std^2) at ``x`` [B, ...], mean over the dimensions of each sample: [B] in fp32.

    ``std`` must be positive. With the ``mean`` of another denoiser it gives the same sample's log-probability under
    that denoiser, as policy gradients need.
    """
    deviation = (x.float() - mean.float()) / std
    return -0.5 * deviation.square().flatten(1).mean(dim=1) - math.log(std) - 0.5 * math.log(2 * math.pi)


def sde_step(x: Tensor, sigma: float, sigma_next: float, velocity: Tensor, noise: Tensor, eta: float = 1.0) -> SDEStep:
    """One coefficient-preserving stochastic step, ``mean + std * noise``; see :func:`sde_mean_std`.

    The step to ``sigma_next`` 0 is deterministic and has no ``log_prob``.
    """
    mean, std = sde_mean_std(x, sigma, sigma_next, velocity, eta)
    if std == 0:
        return SDEStep(mean, mean, 0.0, None)
    x_next = mean + std * noise
    return SDEStep(x_next, mean, std, normal_log_prob(x_next.detach(), mean, std))


def iterate(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    prompts: EncodedPrompts,
    *,
    sampler: Sampler = "euler",
    eta: float = 1.0,
    noise: Noise = torch.randn_like,
) -> Iterator[SamplerStep]:
    """Run a sampler, a step at a time: the one loop behind sampling, backward simulation and rollouts.

    Args:
        denoiser: evaluated once a step.
        x: [B, C, ..., H, W] at ``sigmas[0]``; pure noise where that is 1.
        sigmas: falling noise levels. They end with 0, or earlier: the last ``x_next`` is at ``sigmas[-1]``.
        sampler: "euler", or "sde" for :func:`sde_step`: predict the data, return to the next level with fresh noise
            (consistency models, arXiv 2303.01469, algorithm 1; DMD2, arXiv 2405.14867, section 4.4).
        eta: share of fresh noise in each step of "sde", in [0, 1].
        noise: draws the fresh noise of "sde", once for every step but that to 0.

    Yields:
        Each step after it was made. Whether gradients are recorded is the caller's choice.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = denoiser(x, torch.full((len(x),), sigma, device=x.device), prompts)
        if sampler == "euler":
            x_next = euler_step(x, sigma, sigma_next, velocity)
            made = SDEStep(x_next, x_next, 0.0, None)
        else:
            fresh = noise(x) if sigma_next > 0 else torch.zeros_like(x)
            made = sde_step(x, sigma, sigma_next, velocity, fresh, eta)
        yield SamplerStep(index, sigma, sigma_next, x, velocity, made.x, made.mean, made.std, made.log_prob)
        x = made.x


def last_state(x: Tensor, steps: Iterable[SamplerStep]) -> Tensor:
    """Where the steps lead: the last one's ``x_next``; ``x`` if there is none."""
    for step in steps:
        x = step.x_next
    return x


def sample_euler(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], prompts: EncodedPrompts) -> Tensor:
    """Euler's method: deterministic, the steps of ``FlowMatchEulerDiscreteScheduler``.

    Args:
        x: [B, C, ..., H, W] at ``sigmas[0]``; pure noise where that is 1.
        sigmas: falling noise levels, with their terminal 0.

    Returns:
        [B, C, ..., H, W], data.
    """
    return last_state(x, iterate(denoiser, x, sigmas, prompts))
