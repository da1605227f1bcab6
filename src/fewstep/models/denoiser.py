"""What a denoiser is, and guidance: all that algorithms know of a model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fewstep import flow
from fewstep.models.prompts import EncodedPrompts


class Denoiser(Protocol):
    """``denoiser(x, sigma, prompts) -> velocity``.

    ``x`` [B, C, H, W], ``sigma`` [B] in [0, 1] with 1 at noise, ``prompts`` a batch of B encoded prompts; returns the
    velocity ``eps - x0``, [B, C, H, W].
    """

    def __call__(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor: ...


class FeatureExtractor(Protocol):
    """A denoiser's inner view of noisy images: [B, L, D], L tokens of the image; arguments as a denoiser's."""

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor: ...


def predict_x0(denoiser: Denoiser, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
    """The data a denoiser sees in ``x``: ``x - sigma * velocity``."""
    return flow.x0_from_velocity(x, sigma, denoiser(x, sigma, prompts))


class Guided:
    """Classifier-free guidance (arXiv 2207.12598) as a denoiser: ``v_null + alpha (v_cond - v_null)``.

    Args:
        denoiser: the model.
        null: the encoded empty prompt, a batch of one.
        alpha: 1 is no guidance. It is one more than the ``guidance_scale`` that users give.
    """

    def __init__(self, denoiser: Denoiser, null: EncodedPrompts, alpha: float) -> None:
        self.denoiser, self.null, self.alpha = denoiser, null, alpha

    def __call__(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        both = EncodedPrompts.cat([prompts, self.null.repeat(len(x))])
        cond, null = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return null + self.alpha * (cond - null)
