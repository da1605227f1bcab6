"""DPO on preference pairs at the student's steps: people's votes on images, or samples that rewards score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import SamplerStep, normal_log_prob, sde_mean_std
from fewstep.data.batch import DistillBatch
from fewstep.data.preference_batches import preference_batches
from fewstep.data.preferences import preference_pairs
from fewstep.methods.dmd.terms.base import RolloutTerm, TermSettings, TermSetup
from fewstep.methods.dmd.terms.dpo_pairs import PairMaker, Pairs, SampledPairs, VotedPairs
from fewstep.methods.dmd.terms.policy import REFERENCE
from fewstep.methods.dmd.terms.scoring import (
    RewardSettings,
    ScoredTermSettings,
    check_groups,
    open_scorer,
    score_metrics,
)
from fewstep.methods.rl.dpo import dpo_loss

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.base import DataSetup
    from fewstep.methods.dmd.config import DMDConfig

VOTED = "preferences"  # the batch source of pairs from votes


class DPOSettings(ScoredTermSettings):
    """Settings of the DPO term."""

    rewards: list[RewardSettings] = Field(
        default_factory=list, description="Rewards that score the student's samples; leave them out with votes."
    )
    votes: str | None = Field(
        None, description="Folder of fewstep prefs collect, whose pairs of images are trained on; null samples pairs."
    )
    voter: str | None = Field(None, description="Only this voter's votes; null is all voters.")
    beta: Annotated[float, Field(gt=0)] = Field(100.0, description="Sharpness, for mean log-probabilities.")
    eta: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of fresh noise in the stochastic steps.")
    least_difference: Annotated[float, Field(gt=0)] = Field(
        0.1,
        description="Least difference of a pair's scores, in running deviations; other pairs are left out.",
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        if bool(self.rewards) == (self.votes is not None):
            raise ValueError("method.terms.dpo: give rewards, or votes (a folder of fewstep prefs collect), not both")
        if self.voter is not None and self.votes is None:
            raise ValueError("method.terms.dpo.voter: no effect without votes; leave it out")
        least = 2 if self.votes is None else 3
        if self.votes is None:
            check_groups("dpo", method)
        if stage.student.steps < least:
            raise ValueError(
                f"method.terms.dpo: a student of {stage.student.steps} steps has no stochastic step to train, it takes "
                f"{least}; use reward or surrogate"
            )

    def further_prompts(self) -> list[str]:
        return [] if self.votes is None else [pair.prompt for pair in preference_pairs(self.votes, self.voter)]


@loss_terms.register("dpo")
class DPO(RolloutTerm):
    """
    reference: the student as it was at first.
    pairs: makes the preference pairs.
    """

    Settings = DPOSettings

    def __init__(self, student: nn.Module, reference: nn.Module, pairs: PairMaker, settings: DPOSettings) -> None:
        self.student, self.reference, self.pairs, self.settings = student, reference, pairs, settings
        self._metrics: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, DPOSettings)
        return {"student/dpo", "student/dpo_pairs", "student/dpo_margin"} | score_metrics(settings.rewards)

    @classmethod
    def student_copies(cls, settings: TermSettings) -> tuple[str, ...]:
        return (REFERENCE,)

    @classmethod
    def batch_sources(cls, settings: TermSettings, setup: DataSetup) -> dict[str, BatchSource]:
        assert isinstance(settings, DPOSettings)
        if settings.votes is None:
            return {}
        train = setup.recipe.train
        return {VOTED: preference_batches(settings.votes, settings.voter, setup.teacher, train.batch_size, train.seed)}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, DPOSettings)
        pairs: PairMaker
        if settings.votes is None:
            scorer = open_scorer(settings, setup, "dpo")
            sampled = setup.sigmas, settings.eta, setup.config.group_size, settings.least_difference
            pairs = SampledPairs(setup.student, scorer, *sampled)
        else:
            pairs = VotedPairs(setup.sources[VOTED], setup.dist.shard, setup.sigmas, settings.eta)
        return cls(setup.student, setup.copies[REFERENCE], pairs, settings)

    @torch.no_grad()
    def collect(self, batch: DistillBatch) -> Pairs:
        return self.pairs(batch)

    def loss(self, collected: Pairs) -> Tensor:
        """The mean over pairs and stochastic steps; a pair that does not count has no gradient."""
        losses, margins = [], []
        for step in collected.steps:
            own = self._log_prob(self.student, step, collected.prompts)
            with torch.no_grad():
                kept = self._log_prob(self.reference, step, collected.prompts)
            w, l = collected.winners, collected.losers  # noqa: E741
            pair = dpo_loss(own[w], own[l], kept[w], kept[l], self.settings.beta)
            losses.append(torch.where(collected.counted, pair, 0.0).mean())
            margins.append(((own[w] - kept[w]) - (own[l] - kept[l])).detach().mean())
        self._metrics = {"dpo_pairs": collected.counted.float().mean(), "dpo_margin": torch.stack(margins).mean()}
        return torch.stack(losses).mean()

    def _log_prob(self, denoiser: Callable[..., Tensor], step: SamplerStep, prompts: EncodedPrompts) -> Tensor:
        sigma = torch.full((len(step.x),), step.sigma, device=step.x.device)
        velocity = denoiser(step.x, sigma, prompts)
        mean, std = sde_mean_std(step.x, step.sigma, step.sigma_next, velocity, self.settings.eta)
        return normal_log_prob(step.x_next, mean, std)

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics | self.pairs.metrics()

    def frozen_bytes(self) -> dict[str, float]:
        return self.pairs.frozen_bytes()

    def state_dict(self) -> dict[str, Tensor]:
        return self.pairs.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.pairs.load_state_dict(state)
