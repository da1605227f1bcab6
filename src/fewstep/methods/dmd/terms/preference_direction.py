"""A direction learned from preferences (TDM-R1, arXiv 2603.07700): what terms with a surrogate share.

A third copy of the teacher, the surrogate, learns which samples of a group score better; the student's samples move
from the teacher's prediction to the surrogate's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import Fraction
from fewstep.config.schedule import Weight
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.dtensor import copy_full
from fewstep.core.method import Trainable
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.normalize import dmd_weight
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import Direction, DirectionTerm, Renoised, TermSettings
from fewstep.methods.rl.surrogate import denoising_error, surrogate_loss
from fewstep.training.ema import EMA


class PreferenceSettings(TermSettings):
    """Settings of a surrogate; its weight is that of the student's direction."""

    weight: Weight = Field(0.3, validate_default=True, description="Weight: a number, or a schedule over steps.")  # type: ignore[assignment]
    beta: Annotated[float, Field(gt=0)] = Field(1.0, description="Sharpness of the preference: 10 for OCR, else 1.")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-3, description="Largest move of a sample's ratio from the surrogate's moving average."
    )
    pull: Annotated[float, Field(ge=0)] = Field(1e-3, description="Weight of the pull to the teacher's errors.")
    fast_ema: Fraction = Field(0.9, description="Decay of the surrogate's moving average that the clip compares with.")
    advantage_bound: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest magnitude of an advantage.")
    std_floor: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Least deviation of the scores that is divided by, in running deviations of the reward."
    )


class PreferenceDirection(DirectionTerm):
    """
    teacher: the reference of both the direction and the preference.
    eps: lower bound of the direction's normalizer.
    """

    level = "dm"
    teacher_prompts = ("cond",)
    trainable_names: ClassVar[tuple[str, ...]] = ("surrogate",)
    model_names = ("surrogate",)

    def __init__(
        self,
        teacher: Denoiser,
        surrogate: nn.Module,
        renoise: Renoise,
        group_size: int,
        settings: PreferenceSettings,
        eps: float,
    ) -> None:
        self.teacher, self.surrogate, self.renoise, self.group_size = teacher, surrogate, renoise, group_size
        self.preference, self.eps = settings, eps
        self.recent = EMA(surrogate, settings.fast_ema)

    @abstractmethod
    def preferences(self, batch: DistillBatch) -> tuple[Tensor, Tensor]:
        """Data predictions of the student [B, C, ..., H, W] for a batch in groups, and their advantages [B]."""

    @abstractmethod
    def score_metrics(self) -> dict[str, Tensor]:
        """What is logged of the last preferences."""

    def direction(
        self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts, renoised: Renoised, teacher: Sequence[Tensor]
    ) -> Direction:
        (reference,) = teacher
        raw = predict_x0(self.surrogate, renoised.x, renoised.sigma, prompts) - reference
        return Direction(raw / dmd_weight(reference, x0, self.eps), raw, {"surrogate_abs": raw.abs().mean()})

    def trainables(self) -> list[Trainable]:
        return [Trainable("surrogate", self.surrogate, self.compute_surrogate_loss)]

    def compute_surrogate_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """A group's preference between its samples; the score of a rollout's end counts for each of its states."""
        batch, settings = batch.grouped(self.group_size), self.preference
        x0, advantages = self.preferences(batch)
        rows = [row - row % self.group_size for row in range(len(x0))]
        # one level and one noise for a group, so that its errors compare
        sigma, eps = self.renoise.sample_sigma(x0)[rows], torch.randn_like(x0)[rows]
        noisy, target = flow.add_noise(x0, sigma, eps), eps - x0
        error = denoising_error(self.surrogate(noisy, sigma, batch.prompts), target)
        with torch.no_grad():
            reference = denoising_error(self.teacher(noisy, sigma, batch.prompts), target)
            with self.recent.applied():
                recent = denoising_error(self.surrogate(noisy, sigma, batch.prompts), target)
        options = {"beta": settings.beta, "clip": settings.clip, "pull": settings.pull}
        loss = surrogate_loss(error, reference, recent, advantages, self.group_size, **options)
        return loss, {"advantage_abs": advantages.abs().mean(), **self.score_metrics()}

    def after_step(self, step: int) -> None:
        # EMA's warm-up would let the copy follow at once in the first steps, where the clip is needed most
        self.recent.update(step + 1000)

    def frozen_bytes(self) -> dict[str, float]:
        return {"surrogate average": float(self.recent.nbytes)}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"recent.{name}": weight for name, weight in self.recent.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, weight in self.recent.weights.items():
            copy_full(weight, state[f"recent.{name}"])
