"""The log-density ratio of two denoisers at a sample: the matching divergence of DMD, sample by sample.

With the velocity ``v = eps - x0`` and levels s, the log-density of a sample in a denoiser's distribution is
``const - integral of (1 - s) / s E|v(x_s) - v|^2 ds`` over s in (0, 1), summed over dimensions (Kong et al., arXiv
2302.03792, with the signal-to-noise ratio ``(1 - s)^2 / s^2``). The constant is the same for both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stratified_levels(u: Tensor, part: int, parts: int, low: float, high: float) -> Tensor:
    """Levels in the ``part``-th of ``parts`` equal shares of ``log sigma`` between ``low`` and ``high``: [B].

    Args:
        u: [B] in [0, 1], uniform.
    """
    return low * torch.exp((part + u) / parts * math.log(high / low))


def log_ratio(error_first: Tensor, error_second: Tensor, sigma: Tensor, low: float, high: float) -> Tensor:
    """An estimate of ``log p_first(x0) - log p_second(x0)`` of each sample, in nats per dimension: [B].

    It is without bias for the levels between ``low`` and ``high``, where sigma is uniform in its logarithm. Over
    samples of the first distribution its mean is the Kullback-Leibler divergence of the first from the second.

    Args:
        error_first, error_second: [B], mean squared errors of the velocity at ``sigma`` [B], with one noise for both.
    """
    return (1 - sigma) * math.log(high / low) * (error_second - error_first)
