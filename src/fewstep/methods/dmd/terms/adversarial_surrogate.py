"""AdvDMD's discriminator as the reward of a surrogate: the alternative to its policy gradient, also at 2 steps.

The surrogate of TDM-R1 (arXiv 2603.07700) learns which samples of a group the discriminator scores higher. The
combination is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.global_rng import shared_draws
from fewstep.core.method import Trainable
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.adversary import ADVERSARY_METRICS, Adversary, AdversarySettings
from fewstep.methods.dmd.terms.base import Direction, Renoised, TermSettings, TermSetup
from fewstep.methods.dmd.terms.policy import stochastic_rollout
from fewstep.methods.dmd.terms.preference_direction import PreferenceDirection, PreferenceSettings
from fewstep.methods.dmd.terms.scoring import check_groups
from fewstep.methods.rl.groups import later_advantages
from fewstep.rewards.moments import Reduce

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig

NAME = "adversarial_surrogate"


class AdversarialSurrogateSettings(PreferenceSettings):
    """Settings of a surrogate of the discriminator; its weight is that of the student's direction."""

    adversary: AdversarySettings = Field(
        default_factory=AdversarySettings, description="The discriminator, and the gate before its use as a reward."
    )
    eta: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Share of fresh noise in the rollouts' steps.")
    least_spread: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Deviation of a group's calibrated scores below which the group is dropped."
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        check_groups(NAME, method)
        self.adversary.check(NAME, stage, method)


@loss_terms.register(NAME)
class AdversarialSurrogate(PreferenceDirection):
    """
    adversary: scores the states of the student's stochastic rollouts.
    reduce: sums over processes.
    """

    Settings = AdversarialSurrogateSettings
    requires_real = True
    student_uses_real = False
    learns_reward = True
    trainable_names = ("surrogate", "discriminator")

    def __init__(
        self,
        teacher: Denoiser,
        surrogate: nn.Module,
        adversary: Adversary,
        renoise: Renoise,
        group_size: int,
        settings: AdversarialSurrogateSettings,
        eps: float = 0.1,
        reduce: Reduce = lambda tensor: tensor,
    ) -> None:
        super().__init__(teacher, surrogate, renoise, group_size, settings, eps)
        self.adversary, self.reduce, self.least_spread = adversary, reduce, settings.least_spread

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/surrogate_abs", "surrogate/advantage_abs", "surrogate/open", *ADVERSARY_METRICS}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, AdversarialSurrogateSettings)
        student, sigmas = setup.student, setup.sigmas
        adversary = Adversary.build(
            settings.adversary, setup, lambda batch: stochastic_rollout(student, batch, sigmas, settings.eta)
        )
        return cls(
            *(setup.teacher.denoiser, setup.extra["surrogate"], adversary, setup.renoise, setup.config.group_size),
            *(settings, setup.config.dmd_norm_eps, setup.dist.all_reduce_sum),
        )

    def direction(
        self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts, renoised: Renoised, teacher: Sequence[Tensor]
    ) -> Direction:
        """As the surrogate's, and exactly 0 while the gate is closed: what it has learned must not move the student."""
        found = super().direction(x0, anchor, prompts, renoised, teacher)
        return found if any(self.adversary.open) else replace(found, delta=torch.zeros_like(found.delta))

    @torch.no_grad()
    def preferences(self, batch: DistillBatch) -> tuple[Tensor, Tensor]:
        """The student's data predictions at one step of its stochastic rollout, and the advantages of what follows."""
        made = self.adversary.simulate(batch)
        with shared_draws():
            index = int(torch.randint(len(made), ()))
        scores = self.adversary.scores(made, batch.prompts, self.group_size)
        return made[index].x0, later_advantages(
            *(scores, self.adversary.open, index, self.group_size),
            least=self.least_spread,
            floor=self.preference.std_floor,
            bound=self.preference.advantage_bound,
            reduce=self.reduce,
        )

    def score_metrics(self) -> dict[str, Tensor]:
        return {"open": torch.tensor(sum(self.adversary.open) / len(self.adversary.open))}

    def trainables(self) -> list[Trainable]:
        return [*super().trainables(), self.adversary.trainable()]

    def before_step(self, step: int) -> None:
        self.adversary.before_step(step)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.adversary.after_step(step)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.adversary.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.adversary.load_state_dict(state)
