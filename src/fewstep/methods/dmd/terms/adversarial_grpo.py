"""AdvDMD (arXiv 2604.28126): the discriminator of the student's intermediate and final states is the reward of GRPO.

Distribution matching is taken in every step of the training, the policy gradient in every n-th. What the paper's public
parts do not give is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.schedule import Weight
from fewstep.core.method import Trainable
from fewstep.core.registry import loss_terms
from fewstep.core.schedules import Schedule
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.adversary import ADVERSARY_METRICS, Adversary, AdversarySettings
from fewstep.methods.dmd.terms.base import TermSettings, TermSetup
from fewstep.methods.dmd.terms.policy import (
    REFERENCE,
    PolicySettings,
    PolicyTerm,
    Rollout,
    policy_metrics,
    stochastic_rollout,
)
from fewstep.methods.rl.groups import later_advantages
from fewstep.rewards.moments import Reduce

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig

NAME = "adversarial_grpo"


class AdversarialGRPOSettings(PolicySettings):
    """Settings of GRPO with the discriminator as the reward."""

    adversary: AdversarySettings = Field(
        default_factory=AdversarySettings, description="The discriminator, and the gate before its use as a reward."
    )
    every: Weight = Field(
        4.0,
        validate_default=True,
        description="Steps of the training for each of the policy: a number, or a schedule over the steps since the "
        "gate first opened.",
    )
    least_spread: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Deviation of a group's calibrated scores below which the group is dropped."
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        self.check_policy(NAME, stage, method)
        self.adversary.check(NAME, stage, method)
        try:
            every = self.every.resolve(stage.train.steps)
        except ValueError as error:
            raise ValueError(f"method.terms.{NAME}.every: {error}") from None
        least = min(every(step) for step in [*every.breakpoints, stage.train.steps])
        if least < 1:
            raise ValueError(
                f"method.terms.{NAME}.every falls to {least:g}: at most one policy step is taken in a step"
            )


@loss_terms.register(NAME)
class AdversarialGRPO(PolicyTerm):
    """
    adversary: scores the states of the rollouts.
    every: steps of the training for each of the policy, over the steps since the gate first opened.
    reduce: sums over processes.
    """

    Settings = AdversarialGRPOSettings
    requires_real = True
    student_uses_real = False
    learns_reward = True
    trainable_names = ("discriminator",)

    def __init__(
        self,
        student: nn.Module,
        adversary: Adversary,
        sigmas: Sequence[float],
        group_size: int,
        settings: AdversarialGRPOSettings,
        every: Schedule,
        reference: nn.Module | None = None,
        reduce: Reduce = lambda tensor: tensor,
    ) -> None:
        super().__init__(student, sigmas, settings, reference, NAME)
        self.adversary, self.group_size, self.every, self.reduce = adversary, group_size, every, reduce
        self.least_spread = settings.least_spread

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        assert isinstance(settings, AdversarialGRPOSettings)
        own = {f"student/{NAME}_{key}" for key in ("open", "stopped", "due")}
        return own | policy_metrics(NAME, settings) | ADVERSARY_METRICS

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, AdversarialGRPOSettings)
        student, sigmas = setup.student, setup.sigmas
        adversary = Adversary.build(
            settings.adversary, setup, lambda batch: stochastic_rollout(student, batch, sigmas, settings.eta)
        )
        reference = setup.copies[REFERENCE] if settings.kl_weight else None
        return cls(
            *(student, adversary, sigmas, setup.config.group_size, settings),
            *(settings.every.resolve(setup.total_steps), reference, setup.dist.all_reduce_sum),
        )

    def trainables(self) -> list[Trainable]:
        return [self.adversary.trainable()]

    @property
    def due(self) -> bool:
        """Whether the policy is updated in this step: the gate is open, and it is the turn of the policy."""
        if self.adversary.planned:
            return True
        since = self.adversary.step - (self.adversary.gate.opened_at or 0)
        return any(self.adversary.open) and since % round(self.every(max(0, since))) == 0

    @torch.no_grad()
    def collect(self, batch: DistillBatch) -> Rollout:
        """The advantage of a step is that of the mean score of all later states that may be rewarded. In a step of the
        training without policy update no rollout is made, and nothing is drawn."""
        if not self.due:
            return Rollout((), batch.prompts, ())
        made, open_ = self.simulate(batch), self.adversary.open
        scores = self.adversary.scores(made, batch.prompts, self.group_size)
        usable = [step for step in made if step.std > 0 and any(open_[step.index :])]
        steps = self.drawn(usable)
        return Rollout(steps, batch.prompts, [self._advantages(scores, open_, step.index) for step in steps])

    def _advantages(self, scores: Tensor, open_: Sequence[bool], index: int) -> Tensor:
        """[B], of the step with this index: of the scores [steps, B] from the state it leads to on."""
        return later_advantages(
            *(scores, open_, index, self.group_size),
            least=self.least_spread,
            floor=self.policy.std_floor,
            bound=self.policy.advantage_bound,
            reduce=self.reduce,
        )

    def metrics(self) -> dict[str, Tensor]:
        open_ = sum(self.adversary.open) / len(self.adversary.open)
        state = {"open": open_, "stopped": float(self.adversary.gate.stopped), "due": float(self.due)}
        return self._metrics | {f"{NAME}_{key}": torch.tensor(value) for key, value in state.items()}

    def before_step(self, step: int) -> None:
        self.adversary.before_step(step)

    def after_step(self, step: int) -> None:
        self.adversary.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        return self.adversary.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.adversary.load_state_dict(state)
