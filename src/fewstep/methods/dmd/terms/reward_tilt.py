"""Reward-tilted DM: the target is the teacher's distribution times exp(reward / temperature) (after arXiv 2605.26108).

The term adds to DM what the tilt adds to the real score; the reward is scored on the teacher's data predictions, which
are images long before the student's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core import flow
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.normalize import dmd_weight, pseudo_target_loss
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    ScoredTerm,
    ScoredTermSettings,
    open_scorer,
    reward_names,
    score_metrics,
)
from fewstep.methods.rl.refl import Goal, output_gradient, shortfall
from fewstep.methods.rl.tilt import tilt


class RewardTiltSettings(ScoredTermSettings):
    """Settings of the reward-tilted term. Scores count as they are, without normalization."""

    needs_gradient = True

    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="Of the tilt: the reward counts 1 / temperature, in units of the score.",
    )


@loss_terms.register("reward_tilt")
class RewardTilt(ScoredTerm, RegularizerTerm):
    """
    weights: of each of the scorer's rewards.
    eps: lower bound of the per-sample normalizer, which is that of DM.
    """

    Settings = RewardTiltSettings

    def __init__(
        self,
        teacher: Denoiser,
        scorer: LatentScorer,
        weights: Mapping[str, float],
        renoise: Renoise,
        temperature: float,
        eps: float,
    ) -> None:
        self.teacher, self.scorer, self.renoise = teacher, scorer, renoise
        self.goals = {name: Goal(weight) for name, weight in weights.items()}
        self.temperature, self.eps = temperature, eps
        self._metrics: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, RewardTiltSettings)
        return {"student/reward_tilt", "student/tilt_abs"} | score_metrics(settings.rewards)

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, RewardTiltSettings)
        scorer = open_scorer(settings, setup, "reward_tilt")
        names = reward_names(settings.rewards)
        weights = {name: each.weight for name, each in zip(names, settings.rewards, strict=True)}
        eps = setup.config.dmd_norm_eps
        return cls(setup.teacher.denoiser, scorer, weights, setup.renoise, settings.temperature, eps)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        assert sample is not None
        added, normalizer = self.direction(sample, batch)
        self._metrics = {"tilt_abs": added.abs().mean()}
        return pseudo_target_loss(sample.x0, added / normalizer)

    @torch.no_grad()
    def direction(self, sample: StudentSample, batch: DistillBatch) -> tuple[Tensor, Tensor]:
        """What the tilt adds to the teacher's data prediction at sigma_DM, and the normalizer of DM there."""
        x0 = sample.x0.detach()
        _, sigma = self.renoise.sample_sigmas(sample.anchor)
        x0_teacher = predict_x0(self.teacher, flow.add_noise(x0, sigma, torch.randn_like(x0)), sigma, batch.prompts)
        _, gradient = output_gradient(lambda x: -self._shortfall(x, batch), x0_teacher)
        return tilt(gradient, sigma, self.temperature), dmd_weight(x0_teacher, x0, self.eps)

    def _shortfall(self, x0: Tensor, batch: DistillBatch) -> Tensor:
        return shortfall(self.scorer.scores(x0, batch.texts), self.goals).sum()

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics | super().metrics()
