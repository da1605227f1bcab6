"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser


class ClassifierFreeGuidance:
    """Classifier-free guidance (arXiv 2207.12598) as a denoiser: ``v_null + alpha (v_cond - v_null)``.

    Args:
        denoiser: the model.
        null: the null or negative prompt, encoded: a batch of one, or one for each sample.
        alpha: 1 is no guidance. It is the users' ``guidance_scale`` plus one.
        normalization: upper bound of the guided velocity's norm, in multiples of the conditional one's; 0 is no bound.
        truncation: there is no guidance, and no second forward, where ``1 - sigma`` is larger.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        null: EncodedPrompts,
        alpha: float,
        normalization: float = 0.0,
        truncation: float = 1.0,
    ) -> None:
        self.denoiser, self.null, self.alpha = denoiser, null, alpha
        self.normalization, self.truncation = normalization, truncation
        self._last: tuple[EncodedPrompts, EncodedPrompts] | None = None  # prompts, and these with the null prompts

    def __call__(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        truncated = 1 - sigma > self.truncation
        if self.truncation < 1 and bool(truncated.all()):
            return self.denoiser(x, sigma, prompts)
        if self._last is None or self._last[0] is not prompts:
            null_prompts = self.null if len(self.null) == len(x) else self.null.repeat(len(x))
            self._last = prompts, EncodedPrompts.concat([prompts, null_prompts])
        both = self._last[1]
        cond, null = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        guided = null + self.alpha * (cond - null)
        if self.normalization:
            bound = self.normalization * _norm(cond)
            guided = guided * (bound / _norm(guided).clamp(min=1e-12)).clamp(max=1)
        if self.truncation < 1:
            return torch.where(truncated.reshape(-1, *[1] * (x.ndim - 1)), cond, guided)
        return guided


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
