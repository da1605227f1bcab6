"""Reward-weighted DMD: samples of higher reward are moved a little further; any reward will do, its effect is weak."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.config.base import Fraction, Updates
from fewstep.config.schedule import Weight
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import StudentSample, TermSettings, TermSetup, WeightingTerm
from fewstep.methods.dmd.terms.scoring import LatentScorer, ScoredTerm, ScoredTermSettings, open_scorer, score_metrics
from fewstep.methods.rl.weighting import reward_weight


class RewardWeightingSettings(ScoredTermSettings):
    """Settings of reward weighting."""

    weight: Weight = Field(
        {"kind": "linear", "start": 0.0, "end": 0.25, "last_step": "25%"},  # type: ignore[assignment]
        validate_default=True,
        description="Share of the reward in a sample's weight: a number, or a schedule over steps.",
    )
    beta: Annotated[float, Field(gt=0)] = Field(1.0, description="Deviations of the score for a factor of e.")
    low: Fraction = Field(0.9, description="Least factor of a sample.")
    high: Annotated[float, Field(ge=1, le=10)] = Field(1.15, description="Greatest factor of a sample.")
    score_every: Updates = Field(4, description="Steps between two whose samples are scored; in others all count 1.")

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if any(self.weight.resolve(100)(step) > 1 for step in range(101)):
            raise ValueError("weight: it is a share, at most 1")
        return self


@loss_terms.register("reward_weighting")
class RewardWeighting(ScoredTerm, WeightingTerm):
    """
    beta, low, high: as in :func:`fewstep.methods.rl.weighting.reward_weight`.
    score_every: steps between those whose samples are scored.
    """

    Settings = RewardWeightingSettings

    def __init__(
        self, scorer: LatentScorer, beta: float = 1.0, low: float = 0.9, high: float = 1.15, score_every: int = 4
    ) -> None:
        self.scorer, self.beta, self.low, self.high, self.score_every = scorer, beta, low, high, score_every
        self.step = 0

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, RewardWeightingSettings)
        return {"student/reward_weighting", "student/reward_weighting_spread"} | score_metrics(settings.rewards)

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, RewardWeightingSettings)
        scorer = open_scorer(settings, setup, "reward_weighting")
        return cls(scorer, settings.beta, settings.low, settings.high, settings.score_every)

    def before_step(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def sample_weights(self, share: float, sample: StudentSample, batch: DistillBatch) -> Tensor | None:
        if self.step % self.score_every:
            return None
        z = self.scorer.combined(sample.x0.detach(), batch.texts)
        return reward_weight(z, share, self.beta, self.low, self.high)
