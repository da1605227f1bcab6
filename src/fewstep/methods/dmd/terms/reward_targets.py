"""On-policy reward targets (after DiffusionOPSD, arXiv 2608.24646): bounded, detached steps of a reward's gradient.

A moving average of the student makes the rollouts and the predictions from which the targets are one step away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import Fraction, Updates
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import predict_x0
from fewstep.core.dtensor import copy_full
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import iterate, last_state
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RolloutTerm, TermSettings, TermSetup
from fewstep.methods.dmd.terms.reward import ReflRewardSettings
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    ScoredTerm,
    ScoredTermSettings,
    open_scorer,
    reward_names,
    score_metrics,
)
from fewstep.methods.rl.refl import Goal, output_gradient, shortfall
from fewstep.methods.rl.targets import bounded_step, target_loss
from fewstep.training.ema import EMA


class RewardTargetsSettings(ScoredTermSettings):
    """Settings of the on-policy reward targets."""

    needs_gradient = True

    rewards: Annotated[list[ReflRewardSettings], Field(min_length=1)] = Field(  # type: ignore[assignment]
        description="The rewards, each with its weight and margin. Their scores count as they are."
    )
    radius: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Length of the step, relative to the norm of the prediction that it starts from."
    )
    beta: Annotated[float, Field(gt=0)] = Field(
        1.0, description="The student is fitted to a step of this fraction: its own is 1 / beta times as long."
    )
    behavior_ema: Fraction = Field(0.9, description="Decay of the moving average that makes the targets.")
    updates: Updates = Field(1, description="Updates of the student on each rollout.")


@dataclass(frozen=True)
class Targets:
    """The last state z of a rollout at sigma [B], the behavior policy's prediction there, and the step from it."""

    z: Tensor
    sigma: Tensor
    prompts: EncodedPrompts
    old: Tensor
    step: Tensor


@loss_terms.register("reward_targets")
class RewardTargets(ScoredTerm, RolloutTerm):
    """
    goals: weight and margin of each of the scorer's rewards.
    sigmas: the student's noise levels from 1 down, with the terminal 0.
    """

    Settings = RewardTargetsSettings

    def __init__(
        self,
        student: nn.Module,
        scorer: LatentScorer,
        goals: Mapping[str, Goal],
        sigmas: Sequence[float],
        settings: RewardTargetsSettings,
    ) -> None:
        self.student, self.scorer, self.goals = student, scorer, dict(goals)
        self.sigmas, self.settings, self.updates = list(sigmas), settings, settings.updates
        self.behavior = EMA(student, settings.behavior_ema)
        self._metrics: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, RewardTargetsSettings)
        return {"student/reward_targets", "student/target_step", "student/target_drift"} | score_metrics(
            settings.rewards
        )

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, RewardTargetsSettings)
        scorer = open_scorer(settings, setup, "reward_targets")
        names = reward_names(settings.rewards)
        goals = {name: Goal(each.weight, each.margin) for name, each in zip(names, settings.rewards, strict=True)}
        return cls(setup.student, scorer, goals, setup.sigmas, settings)

    @torch.no_grad()
    def collect(self, batch: DistillBatch) -> Targets:
        levels = self.sigmas[:-1]
        with self.behavior.applied():
            z = last_state(batch.noise, iterate(self.student, batch.noise, levels, batch.prompts))
            sigma = torch.full((len(z),), levels[-1], device=z.device)
            old = predict_x0(self.student, z, sigma, batch.prompts).float()
        # of the sum over samples: each has the gradient of its own reward
        _, gradient = output_gradient(lambda x: -self._shortfall(x, batch), old)
        return Targets(z, sigma, batch.prompts, old, bounded_step(old, gradient, self.settings.radius))

    def _shortfall(self, x0: Tensor, batch: DistillBatch) -> Tensor:
        return shortfall(self.scorer.scores(x0, batch.texts), self.goals).sum()

    def loss(self, collected: Targets) -> Tensor:
        x0 = predict_x0(self.student, collected.z, collected.sigma, collected.prompts)
        self._metrics = {
            "target_step": collected.step.square().mean().sqrt(),
            "target_drift": (x0.detach() - collected.old).square().mean().sqrt(),
        }
        return target_loss(x0, collected.old, collected.step, self.settings.beta)

    def after_step(self, step: int) -> None:
        # EMA's warm-up would let the behavior policy follow at once in the first steps
        self.behavior.update(step + 1000)

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics | super().metrics()

    def frozen_bytes(self) -> dict[str, float]:
        return super().frozen_bytes() | {"behavior policy": float(self.behavior.nbytes)}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"behavior.{name}": weight for name, weight in self.behavior.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, weight in self.behavior.weights.items():
            copy_full(weight, state[f"behavior.{name}"])
