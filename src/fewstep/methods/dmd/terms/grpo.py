"""GRPO with any reward: stochastic rollouts in groups of one prompt, distribution matching (or KL) as the anchor.

RTDMD (arXiv 2605.26108): the mean of each prompt and one deviation for all; the policy gradient is in ``policy``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import TermSettings, TermSetup
from fewstep.methods.dmd.terms.matching_reward import MatchingDivergence, MatchingSettings
from fewstep.methods.dmd.terms.policy import REFERENCE, PolicySettings, PolicyTerm, Rollout, policy_metrics
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    ScoredTerm,
    ScoredTermSettings,
    open_scorer,
    score_metrics,
)
from fewstep.methods.rl.groups import group_advantages
from fewstep.rewards.moments import Reduce

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class GRPOSettings(PolicySettings, ScoredTermSettings):
    """Settings of the GRPO term."""

    matching: MatchingSettings | None = Field(
        None,
        description="DMD as a part of the reward: a sample's log-density ratio of fake score and teacher is "
        "subtracted; null leaves it out.",
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        if self.matching is not None and "distribution_matching" not in method.terms.active(stage.train.steps):
            raise ValueError(
                "method.terms.grpo.matching: it compares the teacher with the fake score, which distribution_matching "
                "trains; give that term a weight, small if the reward alone should match"
            )
        if stage.student.steps < 3:
            raise ValueError(
                f"method.terms.grpo: a student of {stage.student.steps} steps has too few stochastic ones (the last is "
                "deterministic); use reward, or surrogate for rewards without gradient"
            )
        self.check_policy("grpo", stage, method)


@loss_terms.register("grpo")
class GRPO(ScoredTerm, PolicyTerm):
    """
    sigmas: the student's noise levels from 1 down, with the terminal 0.
    reference: the student as it was at first, for ``kl_weight``.
    divergence: what is subtracted from the reward, for ``matching``.
    reduce: sums over processes.
    """

    Settings = GRPOSettings

    def __init__(
        self,
        student: nn.Module,
        scorer: LatentScorer,
        sigmas: Sequence[float],
        group_size: int,
        settings: GRPOSettings,
        reference: nn.Module | None = None,
        reduce: Reduce = lambda tensor: tensor,
        divergence: MatchingDivergence | None = None,
    ) -> None:
        super().__init__(student, sigmas, settings, reference, "grpo")
        self.scorer, self.group_size, self.reduce, self.divergence = scorer, group_size, reduce, divergence
        self._collected: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, GRPOSettings)
        own = {"student/grpo_divergence"} if settings.matching else set()
        return own | policy_metrics("grpo", settings) | score_metrics(settings.rewards)

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, GRPOSettings)
        scorer = open_scorer(settings, setup, "grpo")
        reference = setup.copies[REFERENCE] if settings.kl_weight else None
        group_size, reduce = setup.config.group_size, setup.dist.all_reduce_sum
        divergence = None
        if settings.matching is not None:
            models = setup.teacher.denoiser, setup.extra["fake_score"]
            levels = setup.renoise.low, setup.renoise.high
            divergence = MatchingDivergence(*models, group_size, settings.matching, *levels)
        return cls(setup.student, scorer, setup.sigmas, group_size, settings, reference, reduce, divergence)

    @torch.no_grad()
    def collect(self, batch: DistillBatch) -> Rollout:
        made = self.simulate(batch)
        z = self.scorer.combined(made[-1].x_next, batch.texts)
        if self.divergence is not None:
            found = self.divergence(made[-1].x_next, batch.prompts)
            z = z - self.divergence.settings.weight * found
            self._collected = {"grpo_divergence": found.mean()}
        advantages = group_advantages(
            z,
            self.group_size,
            floor=self.policy.std_floor,
            bound=self.policy.advantage_bound,
            reduce=self.reduce,
        )
        steps = self.drawn([step for step in made if step.std > 0])
        return Rollout(steps, batch.prompts, [advantages] * len(steps))

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics | self._collected | self.scorer.metrics()
