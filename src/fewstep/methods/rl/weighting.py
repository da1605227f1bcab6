"""Weights of samples by their reward: what every direction of a sample is multiplied by."""

from __future__ import annotations

from torch import Tensor


def reward_weight(z: Tensor, share: float, beta: float, low: float, high: float) -> Tensor:
    """``(1 - share) + share clip(exp(z / beta), low, high)`` of each sample [B]; 1 where z is NaN.

    WorldSlider's weight. It is near 1: with ``share`` .25 and clips .9 and 1.15 in [.975, 1.0375].

    Args:
        z: [B], scores less their running mean, over their running deviation.
        share: in [0, 1], ramped from 0.
    """
    clipped = (z / beta).exp().clamp(low, high)
    return ((1 - share) + share * clipped).nan_to_num(nan=1.0)


def advantage_weight(advantages: Tensor, share: float) -> Tensor:
    """``max(0, 1 + share A)`` of each sample [B]: no direction is turned around."""
    return (1 + share * advantages).clamp(min=0)
