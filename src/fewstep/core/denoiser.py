"""The denoiser protocol: the only view of a model that algorithms have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts


class Denoiser(Protocol):
    """``denoiser(x, sigma, prompts) -> velocity``.

    ``x`` [B, C, ..., H, W], ``sigma`` [B] in [0, 1] with 1 at noise, ``prompts`` a batch of B encoded prompts; returns
    the velocity ``eps - x0``, of the shape of ``x``.
    """

    def __call__(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor: ...


#: The middle of a network, as the shares of its layers after which features are taken.
MIDDLE = (0.5,)


class FeatureExtractor(Protocol):
    """A denoiser's intermediate features of noisy images: [B, L, len(depths) D], L image tokens.

    ``depths`` are shares of its layers, ascending, in (0, 1]: the features after each are concatenated. The other
    arguments are as for a denoiser.
    """

    def features(
        self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE
    ) -> Tensor: ...


def predict_x0(denoiser: Denoiser, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
    """The denoiser's data prediction at ``x``: ``x - sigma * velocity``."""
    return flow.x0_from_velocity(x, sigma, denoiser(x, sigma, prompts))


def flow_matching_loss(denoiser: Denoiser, x0: Tensor, eps: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
    """``||velocity - (eps - x0)||^2`` of each sample, averaged over its elements: [B] (arXiv 2210.02747).

    Args:
        x0, eps: [B, C, ..., H, W], data and noise.
        sigma: [B].
    """
    velocity = denoiser(flow.add_noise(x0, sigma, eps), sigma, prompts)
    return (velocity.float() - (eps - x0)).square().flatten(1).mean(dim=1)
