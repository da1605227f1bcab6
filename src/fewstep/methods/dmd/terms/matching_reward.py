"""DMD as a reward: how much more probable a sample is among the student's than among the teacher's."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config.base import Settings, Updates
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.methods.rl.divergence import log_ratio, stratified_levels
from fewstep.methods.rl.surrogate import denoising_error


class MatchingSettings(Settings):
    """The matching divergence as a part of the reward."""

    weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Of the divergence, in nats per dimension, which is subtracted from the rewards' sum."
    )
    levels: Updates = Field(4, description="Noise levels at which a sample's divergence is estimated.")


class MatchingDivergence:
    """``log p_fake(x0) - log p_teacher(x0)`` of each sample, from the errors of both denoisers.

    The samples of a group have the same levels and noise, so that they compare.

    Args:
        low, high: range of the levels.
    """

    def __init__(
        self,
        teacher: Denoiser,
        fake_score: Denoiser,
        group_size: int,
        settings: MatchingSettings,
        low: float = 0.02,
        high: float = 0.98,
    ) -> None:
        self.teacher, self.fake_score, self.group_size, self.settings = teacher, fake_score, group_size, settings
        self.low, self.high = low, high

    @torch.no_grad()
    def __call__(self, x0: Tensor, prompts: EncodedPrompts) -> Tensor:
        """[B], in nats per dimension, of samples x0 [B, C, ..., H, W]."""
        rows = [row - row % self.group_size for row in range(len(x0))]
        parts, total = self.settings.levels, x0.new_zeros(len(x0), dtype=torch.float32)
        for part in range(parts):
            drawn = torch.rand_like(x0.flatten(1)[:, 0].float())[rows]
            sigma, eps = stratified_levels(drawn, part, parts, self.low, self.high), torch.randn_like(x0)[rows]
            noisy, target = flow.add_noise(x0, sigma, eps), eps - x0
            of_fake = denoising_error(self.fake_score(noisy, sigma, prompts), target)
            of_teacher = denoising_error(self.teacher(noisy, sigma, prompts), target)
            total = total + log_ratio(of_fake, of_teacher, sigma, self.low, self.high) / parts
        return total
