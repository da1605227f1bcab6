"""GRPO with any reward: stochastic rollouts in groups of one prompt, distribution matching (or KL) as the anchor.

RTDMD (arXiv 2605.26108): the coefficient-preserving stochastic step with its last step deterministic, log-probabilities
as means over dimensions, the mean of each prompt and one deviation for all, a narrow clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import Updates
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.global_rng import shared_draws
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import SamplerStep, iterate, normal_log_prob, sde_mean_std
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RolloutTerm, TermSettings, TermSetup
from fewstep.methods.dmd.terms.matching_reward import MatchingDivergence, MatchingSettings
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    ScoredTerm,
    ScoredTermSettings,
    check_groups,
    open_scorer,
    score_metrics,
)
from fewstep.methods.rl.groups import group_advantages
from fewstep.methods.rl.grpo import gaussian_kl, policy_loss
from fewstep.rewards.moments import Reduce

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig

REFERENCE = "reference"  # the student as it was when the training began


class GRPOSettings(ScoredTermSettings):
    """Settings of the GRPO term."""

    eta: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of fresh noise in the stochastic steps.")
    trained_steps: Updates = Field(2, description="Stochastic steps that are trained, drawn anew for each rollout.")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="Largest distance of the probability ratio from 1."
    )
    updates: Updates = Field(1, description="Updates of the student on each rollout; the clip acts from the second on.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the KL divergence from the student as it was at first; 0 leaves DM as the anchor."
    )
    advantage_bound: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest magnitude of an advantage.")
    std_floor: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Least deviation of the scores that is divided by, in running deviations of the reward."
    )

    matching: MatchingSettings | None = Field(
        None,
        description="DMD as a part of the reward: a sample's log-density ratio of fake score and teacher is "
        "subtracted; null leaves it out.",
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        check_groups("grpo", method)
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
        if self.trained_steps > stage.student.steps - 1:
            raise ValueError(
                f"method.terms.grpo.trained_steps {self.trained_steps}: {stage.student.steps} steps have "
                f"{stage.student.steps - 1} stochastic ones"
            )
        if not self.kl_weight and "distribution_matching" not in method.terms.active(stage.train.steps):
            raise ValueError(
                "method.terms.grpo: without distribution_matching or kl_weight nothing keeps the student from "
                "exploiting the reward; give one of them a weight"
            )


@dataclass(frozen=True)
class Rollout:
    """A batch's rollout: the stochastic steps that are trained, and the advantages [B] of its samples."""

    steps: Sequence[SamplerStep]
    prompts: EncodedPrompts
    advantages: Tensor


@loss_terms.register("grpo")
class GRPO(ScoredTerm, RolloutTerm):
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
        self.student, self.scorer, self.sigmas, self.group_size = student, scorer, list(sigmas), group_size
        self.settings, self.reference, self.reduce, self.divergence = settings, reference, reduce, divergence
        self.updates = settings.updates
        self._metrics: dict[str, Tensor] = {}
        self._collected: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, GRPOSettings)
        own = {"student/grpo", "student/grpo_advantage_abs", "student/grpo_ratio_diff"}
        own |= {"student/grpo_kl"} if settings.kl_weight else set()
        own |= {"student/grpo_divergence"} if settings.matching else set()
        return own | score_metrics(settings.rewards)

    @classmethod
    def student_copies(cls, settings: TermSettings) -> tuple[str, ...]:
        assert isinstance(settings, GRPOSettings)
        return (REFERENCE,) if settings.kl_weight else ()

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
        made = list(
            iterate(self.student, batch.noise, self.sigmas, batch.prompts, sampler="sde", eta=self.settings.eta)
        )
        z = self.scorer.combined(made[-1].x_next, batch.texts)
        if self.divergence is not None:
            found = self.divergence(made[-1].x_next, batch.prompts)
            z = z - self.divergence.settings.weight * found
            self._collected = {"grpo_divergence": found.mean()}
        advantages = group_advantages(
            z,
            self.group_size,
            floor=self.settings.std_floor,
            bound=self.settings.advantage_bound,
            reduce=self.reduce,
        )
        return Rollout(self._drawn(made), batch.prompts, advantages)

    def _drawn(self, made: Sequence[SamplerStep]) -> list[SamplerStep]:
        """Some of the stochastic steps, in order; the same on all processes."""
        stochastic = [step for step in made if step.std > 0]
        with shared_draws():
            order = torch.rand(len(stochastic)).argsort().tolist()
        return [stochastic[index] for index in sorted(order[: self.settings.trained_steps])]

    def loss(self, collected: Rollout) -> Tensor:
        loss = collected.advantages.new_zeros(())
        ratios, divergences = [], []
        for step in collected.steps:
            mean = self._mean(self.student, step, collected.prompts)
            log_prob = normal_log_prob(step.x_next, mean, step.std)
            assert step.log_prob is not None
            loss = loss + policy_loss(log_prob, step.log_prob, collected.advantages, self.settings.clip)
            ratios.append((log_prob.detach() - step.log_prob).exp().sub(1).abs().mean())
            if self.reference is not None:
                with torch.no_grad():
                    kept = self._mean(self.reference, step, collected.prompts)
                divergence = gaussian_kl(mean, kept, step.std).mean()
                loss = loss + self.settings.kl_weight * divergence
                divergences.append(divergence.detach())
        self._metrics = {
            "grpo_advantage_abs": collected.advantages.abs().mean(),
            "grpo_ratio_diff": torch.stack(ratios).mean(),
        }
        if divergences:
            self._metrics["grpo_kl"] = torch.stack(divergences).mean()
        return loss / len(collected.steps)

    def _mean(self, denoiser: Callable[..., Tensor], step: SamplerStep, prompts: EncodedPrompts) -> Tensor:
        """The mean of a step's state under a denoiser."""
        sigma = torch.full((len(step.x),), step.sigma, device=step.x.device)
        velocity = denoiser(step.x, sigma, prompts)
        return sde_mean_std(step.x, step.sigma, step.sigma_next, velocity, self.settings.eta)[0]

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics | self._collected | super().metrics()
