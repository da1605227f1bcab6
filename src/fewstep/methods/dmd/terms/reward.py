"""The reward (ReFL): its gradient at the student's output, joined with CA and DM as in DMDR (arXiv 2511.13649)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field
from torch import Tensor

from fewstep.config.base import Updates
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup
from fewstep.methods.dmd.terms.scoring import (
    LatentScorer,
    RewardSettings,
    ScoredTerm,
    ScoredTermSettings,
    open_scorer,
    reward_names,
    score_metrics,
)
from fewstep.methods.rl.balance import Balance
from fewstep.methods.rl.refl import Goal, output_gradient, shortfall, with_output_gradient

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class ReflRewardSettings(RewardSettings):
    """One of the rewards of the reward term."""

    margin: float | None = Field(
        None, description="Score from which on there is nothing to gain: relu(margin - score); null is no such score."
    )


class RewardTermSettings(ScoredTermSettings):
    """Settings of the reward term."""

    needs_gradient = True

    rewards: Annotated[list[ReflRewardSettings], Field(min_length=1)] = Field(  # type: ignore[assignment]
        description="The rewards, each with its weight and margin. Their scores count as they are."
    )
    at: Literal["endpoint", "anchor"] = Field(
        "endpoint",
        description="What is scored: the end of the student's whole rollout, with gradient through its last step; or "
        "the data prediction at the anchor, which CA and DM use anyway.",
    )
    balance: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Gradient norm of the reward over that of CA and DM, at the student's output, when the term "
        "starts; it scales the weight. null takes the weight as it is.",
    )
    balance_updates: Updates = Field(8, description="Updates over which these norms are measured.")

    def check(self, stage: Stage, method: DMDConfig) -> None:
        """A balance needs a direction to be measured against when the term starts."""
        if self.balance is None:
            return
        active = method.terms.active(stage.train.steps)
        own = active["reward"][1]
        first = next(step for step in own.breakpoints if own(step) > 0)
        directions = ("cfg_augmentation", "distribution_matching")
        if not any(name in active and active[name][1](first) > 0 for name in directions):
            raise ValueError(
                f"method.terms.reward.balance: neither cfg_augmentation nor distribution_matching has a weight at step "
                f"{first}, where the reward starts; leave balance out, and set weight"
            )


@loss_terms.register("reward")
class Reward(ScoredTerm, RegularizerTerm):
    """
    goals: weight and margin of each of the scorer's rewards.
    endpoint: as in ``TermSetup``; None scores the data prediction at the anchor.
    balance: scales the term; None leaves it as it is.
    """

    Settings = RewardTermSettings

    def __init__(
        self,
        scorer: LatentScorer,
        goals: Mapping[str, Goal],
        endpoint: Callable[[DistillBatch], Tensor] | None = None,
        balance: Balance | None = None,
    ) -> None:
        self.scorer, self.goals, self.endpoint, self.balance = scorer, dict(goals), endpoint, balance
        self.uses_sample = endpoint is None
        self._metrics: dict[str, Tensor] = {}

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, RewardTermSettings)
        own = {"student/reward", "student/reward_grad_rms"}
        return own | score_metrics(settings.rewards) | ({"student/reward_factor"} if settings.balance else set())

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, RewardTermSettings)
        scorer = open_scorer(settings, setup, "reward")
        names = reward_names(settings.rewards)
        goals = {name: Goal(each.weight, each.margin) for name, each in zip(names, settings.rewards, strict=True)}
        balance = None
        if settings.balance is not None:
            balance = Balance(settings.balance, settings.balance_updates, setup.dist.all_reduce_sum)
        return cls(scorer, goals, setup.endpoint if settings.at == "endpoint" else None, balance)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        if self.endpoint is not None:
            x0 = self.endpoint(batch)
        else:
            assert sample is not None
            x0 = sample.x0
        value, gradient = output_gradient(lambda x: self._shortfall(x, batch), x0)
        self._metrics = {"reward_grad_rms": gradient.square().mean().sqrt() * len(gradient)}
        if self.balance is not None:
            if sample is not None and sample.direction is not None:
                # the pseudo-target loss is a mean over elements: its gradient is the direction over their number
                self.balance.measure(gradient, sample.direction / sample.direction.numel())
            value, gradient = value * self.balance.factor, gradient * self.balance.factor
            self._metrics["reward_factor"] = value.new_tensor(self.balance.factor)
        return with_output_gradient(x0, value, gradient)

    def _shortfall(self, x0: Tensor, batch: DistillBatch) -> Tensor:
        return shortfall(self.scorer.scores(x0, batch.texts), self.goals).mean()

    def metrics(self) -> dict[str, Tensor]:
        return self._metrics | super().metrics()

    def state_dict(self) -> dict[str, Tensor]:
        balance = {} if self.balance is None else {"balance": self.balance.state()}
        return super().state_dict() | balance

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        if self.balance is not None:
            self.balance.load(state["balance"])
