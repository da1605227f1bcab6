"""CFG augmentation weighted by the advantage of each sample in its group: the engine pulls harder at better samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import StudentSample, TermSettings, TermSetup, WeightingTerm
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    ScoredTerm,
    ScoredTermSettings,
    check_groups,
    open_scorer,
    score_metrics,
)
from fewstep.methods.rl.groups import group_advantages
from fewstep.methods.rl.weighting import advantage_weight
from fewstep.rewards.moments import Reduce

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class AdvantageWeightingSettings(ScoredTermSettings):
    """Settings of advantage weighting; its weight multiplies the advantages."""

    std_floor: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Least deviation of the scores that is divided by, in running deviations of the reward."
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        check_groups("advantage_weighting", method)


@loss_terms.register("advantage_weighting")
class AdvantageWeighting(ScoredTerm, WeightingTerm):
    """
    group_size: samples of one prompt in a row.
    reduce: sums over processes.
    """

    Settings = AdvantageWeightingSettings
    applies_to = ("cfg_augmentation",)

    def __init__(
        self,
        scorer: LatentScorer,
        group_size: int,
        std_floor: float = 0.1,
        reduce: Reduce = lambda tensor: tensor,
    ) -> None:
        self.scorer, self.group_size, self.std_floor, self.reduce = scorer, group_size, std_floor, reduce

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, AdvantageWeightingSettings)
        return {"student/advantage_weighting", "student/advantage_weighting_spread"} | score_metrics(settings.rewards)

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, AdvantageWeightingSettings)
        scorer = open_scorer(settings, setup, "advantage_weighting")
        return cls(scorer, setup.config.group_size, settings.std_floor, setup.dist.all_reduce_sum)

    @torch.no_grad()
    def sample_weights(self, share: float, sample: StudentSample, batch: DistillBatch) -> Tensor:
        z = self.scorer.combined(sample.x0.detach(), batch.texts)
        advantages = group_advantages(z, self.group_size, floor=self.std_floor, reduce=self.reduce)
        return advantage_weight(advantages, share)
