"""Reward-tilted distribution matching: the teacher's distribution times ``exp(reward / temperature)`` as the target.

The data prediction of the tilted teacher is, to first order in the reward (Tweedie's formula),
``E[x0 | x] + Cov[x0 | x] grad r(E[x0 | x]) / temperature``. The covariance is taken as that of independent elements.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.core import flow


def posterior_variance(sigma: Tensor, like: Tensor, deviation: float = 1.0) -> Tensor:
    """The variance of x0 given its noisy state, for Gaussian elements: ``s^2 sigma^2 / ((1 - sigma)^2 s^2 + sigma^2)``.

    Args:
        sigma: [B]. like: [B, ...]. deviation: s, of the data.

    Returns:
        [B, 1, ..., 1]: 0 at sigma 0, where the state is the data; s^2 at sigma 1.
    """
    level, variance = flow.append_dims(sigma, like), deviation**2
    return variance * level.square() / ((1 - level).square() * variance + level.square())


def tilt(gradient: Tensor, sigma: Tensor, temperature: float, deviation: float = 1.0) -> Tensor:
    """What the tilted teacher's data prediction adds to the teacher's.

    Args:
        gradient: [B, C, ..., H, W], of each sample's own reward at the teacher's data prediction.
        sigma: [B], the noise level of that prediction's input.
    """
    return posterior_variance(sigma, gradient, deviation) * gradient / temperature
