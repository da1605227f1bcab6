"""DPO on pairs made by sampling and scoring: the best and the worst sample of a group, at the student's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import SamplerStep, iterate, normal_log_prob, sde_mean_std
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RolloutTerm, TermSettings, TermSetup
from fewstep.methods.dmd.terms.grpo import REFERENCE
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    ScoredTerm,
    ScoredTermSettings,
    check_groups,
    open_scorer,
    score_metrics,
)
from fewstep.methods.rl.dpo import best_and_worst, dpo_loss

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class DPOSettings(ScoredTermSettings):
    """Settings of the DPO term."""

    beta: Annotated[float, Field(gt=0)] = Field(100.0, description="Sharpness, for mean log-probabilities.")
    eta: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of fresh noise in the stochastic steps.")
    least_difference: Annotated[float, Field(gt=0)] = Field(
        0.1,
        description="Least difference of a pair's scores, in running deviations; other pairs are left out.",
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        check_groups("dpo", method)
        if stage.student.steps < 2:
            raise ValueError("method.terms.dpo: a student of 1 step has no stochastic step; use reward or surrogate")


@dataclass(frozen=True)
class Pairs:
    """Rollouts, the rows of winners and losers [P], and whether a pair's scores differ enough to count [P]."""

    steps: Sequence[SamplerStep]
    prompts: EncodedPrompts
    winners: Tensor
    losers: Tensor
    counted: Tensor


@loss_terms.register("dpo")
class DPO(ScoredTerm, RolloutTerm):
    """
    reference: the student as it was at first.
    sigmas: the student's noise levels from 1 down, with the terminal 0.
    """

    Settings = DPOSettings

    def __init__(
        self,
        student: nn.Module,
        reference: nn.Module,
        scorer: LatentScorer,
        sigmas: Sequence[float],
        group_size: int,
        settings: DPOSettings,
    ) -> None:
        self.student, self.reference, self.scorer = student, reference, scorer
        self.sigmas, self.group_size, self.settings = list(sigmas), group_size, settings
        self._metrics: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, DPOSettings)
        return {"student/dpo", "student/dpo_pairs", "student/dpo_margin"} | score_metrics(settings.rewards)

    @classmethod
    def student_copies(cls, settings: TermSettings) -> tuple[str, ...]:
        return (REFERENCE,)

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, DPOSettings)
        scorer = open_scorer(settings, setup, "dpo", differentiable=False)
        return cls(setup.student, setup.copies[REFERENCE], scorer, setup.sigmas, setup.config.group_size, settings)

    @torch.no_grad()
    def collect(self, batch: DistillBatch) -> Pairs:
        options = {"sampler": "sde", "eta": self.settings.eta}
        steps = list(iterate(self.student, batch.noise, self.sigmas, batch.prompts, **options))  # type: ignore[arg-type]
        z = self.scorer.combined(steps[-1].x_next, batch.texts)
        found = best_and_worst(z, self.group_size, self.settings.least_difference)
        return Pairs([step for step in steps if step.std > 0], batch.prompts, *found)

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
        return self._metrics | super().metrics()
