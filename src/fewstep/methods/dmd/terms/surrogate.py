"""The surrogate preference direction (TDM-R1, arXiv 2603.07700): for rewards without gradient, also at 2 steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.global_rng import shared_draws
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import iterate
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import TermSettings, TermSetup
from fewstep.methods.dmd.terms.preference_direction import PreferenceDirection, PreferenceSettings
from fewstep.methods.dmd.terms.scoring import LatentScorer, ScoredTermSettings, check_groups, open_scorer
from fewstep.methods.rl.groups import group_advantages
from fewstep.rewards.moments import Reduce

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class SurrogateSettings(PreferenceSettings, ScoredTermSettings):
    """Settings of the surrogate; its weight is that of the student's direction."""

    def check(self, stage: Stage, method: DMDConfig) -> None:
        check_groups("surrogate", method)


@loss_terms.register("surrogate")
class Surrogate(PreferenceDirection):
    """
    teacher: the reference of both the direction and the preference.
    student: rolled out deterministically at sigmas, its noise levels from 1 down with the terminal 0.
    """

    Settings = SurrogateSettings

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        surrogate: nn.Module,
        scorer: LatentScorer,
        renoise: Renoise,
        sigmas: Sequence[float],
        group_size: int,
        settings: SurrogateSettings,
        eps: float = 0.1,
        reduce: Reduce = lambda tensor: tensor,
    ) -> None:
        super().__init__(teacher, surrogate, renoise, group_size, settings, eps)
        self.student, self.scorer, self.sigmas, self.reduce = student, scorer, list(sigmas), reduce

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str] | None:
        assert isinstance(settings, SurrogateSettings)
        return {"student/surrogate_abs", "surrogate/advantage_abs", "surrogate/score"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, SurrogateSettings)
        scorer = open_scorer(settings, setup, "surrogate")
        return cls(
            *(setup.teacher.denoiser, setup.student, setup.extra["surrogate"], scorer, setup.renoise, setup.sigmas),
            *(setup.config.group_size, settings, setup.config.dmd_norm_eps, setup.dist.all_reduce_sum),
        )

    @torch.no_grad()
    def preferences(self, batch: DistillBatch) -> tuple[Tensor, Tensor]:
        """The student's data predictions at one step of its deterministic rollout, and the advantages of its ends."""
        steps = list(iterate(self.student, batch.noise, self.sigmas, batch.prompts))
        z = self.scorer.combined(steps[-1].x_next, batch.texts)
        advantages = group_advantages(
            z,
            self.group_size,
            floor=self.preference.std_floor,
            bound=self.preference.advantage_bound,
            reduce=self.reduce,
        )
        with shared_draws():
            chosen = int(torch.randint(len(steps), ()))
        return steps[chosen].x0, advantages

    def score_metrics(self) -> dict[str, Tensor]:
        scores = [each.nan_to_num(nan=0.0).mean() for each in self.scorer.rewards.scores.values()]
        return {"score": torch.stack(scores).mean()}

    def frozen_bytes(self) -> dict[str, float]:
        return super().frozen_bytes() | self.scorer.frozen_bytes()

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.scorer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.scorer.load_state_dict({name: each for name, each in state.items() if not name.startswith("recent.")})
