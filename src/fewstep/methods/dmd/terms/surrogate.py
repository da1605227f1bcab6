"""The surrogate preference direction (TDM-R1, arXiv 2603.07700): for rewards without gradient, also at 1 and 2 steps.

A third copy of the teacher, the surrogate, learns which samples of a group score better; the student's samples move
from the teacher's prediction to the surrogate's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import Fraction
from fewstep.config.schedule import Weight
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser, predict_x0
from fewstep.core.dtensor import copy_full
from fewstep.core.global_rng import shared_draws
from fewstep.core.method import Trainable
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import iterate
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.normalize import dmd_weight
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import Direction, DirectionTerm, Renoised, TermSettings, TermSetup
from fewstep.methods.dmd.terms.scoring import LatentScorer, ScoredTerm, ScoredTermSettings, check_groups, open_scorer
from fewstep.methods.rl.groups import group_advantages
from fewstep.methods.rl.surrogate import denoising_error, surrogate_loss
from fewstep.rewards.moments import Reduce
from fewstep.training.ema import EMA

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class SurrogateSettings(ScoredTermSettings):
    """Settings of the surrogate; its weight is that of the student's direction."""

    weight: Weight = Field(0.3, validate_default=True, description="Weight: a number, or a schedule over steps.")  # type: ignore[assignment]
    beta: Annotated[float, Field(gt=0)] = Field(1.0, description="Sharpness of the preference: 10 for OCR, else 1.")
    clip: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-3, description="Largest move of a sample's ratio from the surrogate's moving average."
    )
    pull: Annotated[float, Field(ge=0)] = Field(1e-3, description="Weight of the pull to the teacher's errors.")
    fast_ema: Fraction = Field(0.9, description="Decay of the surrogate's moving average that the clip compares with.")
    advantage_bound: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest magnitude of an advantage.")
    std_floor: Annotated[float, Field(gt=0)] = Field(
        0.1, description="Least deviation of the scores that is divided by, in running deviations of the reward."
    )

    def check(self, stage: Stage, method: DMDConfig) -> None:
        check_groups("surrogate", method)


@loss_terms.register("surrogate")
class Surrogate(ScoredTerm, DirectionTerm):
    """
    teacher: the reference of both the direction and the preference.
    student: rolled out deterministically at sigmas, its noise levels from 1 down with the terminal 0.
    """

    Settings = SurrogateSettings
    level = "dm"
    teacher_prompts = ("cond",)
    trainable_names = model_names = ("surrogate",)

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
        self.teacher, self.student, self.surrogate, self.scorer = teacher, student, surrogate, scorer
        self.renoise, self.sigmas, self.group_size = renoise, list(sigmas), group_size
        self.settings, self.eps, self.reduce = settings, eps, reduce
        self.recent = EMA(surrogate, settings.fast_ema)
        self.updates = 0

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

    def direction(
        self, x0: Tensor, anchor: Tensor, prompts: EncodedPrompts, renoised: Renoised, teacher: Sequence[Tensor]
    ) -> Direction:
        (reference,) = teacher
        raw = predict_x0(self.surrogate, renoised.x, renoised.sigma, prompts) - reference
        return Direction(raw / dmd_weight(reference, x0, self.eps), raw, {"surrogate_abs": raw.abs().mean()})

    def trainables(self) -> list[Trainable]:
        return [Trainable("surrogate", self.surrogate, self.compute_surrogate_loss)]

    def compute_surrogate_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """A group's preference between its samples; the score of a rollout's end counts for each of its states."""
        batch, settings = batch.grouped(self.group_size), self.settings
        x0, advantages = self.preferences(batch)
        rows = [row - row % self.group_size for row in range(len(x0))]
        # one level and one noise for a group, so that its errors compare
        sigma, eps = self.renoise.sample_sigma(x0)[rows], torch.randn_like(x0)[rows]
        noisy, target = flow.add_noise(x0, sigma, eps), eps - x0
        error = denoising_error(self.surrogate(noisy, sigma, batch.prompts), target)
        with torch.no_grad():
            reference = denoising_error(self.teacher(noisy, sigma, batch.prompts), target)
            with self.recent.applied():
                recent = denoising_error(self.surrogate(noisy, sigma, batch.prompts), target)
        options = {"beta": settings.beta, "clip": settings.clip, "pull": settings.pull}
        loss = surrogate_loss(error, reference, recent, advantages, self.group_size, **options)
        scores = torch.stack([each.nan_to_num(nan=0.0).mean() for each in self.scorer.rewards.scores.values()])
        return loss, {"advantage_abs": advantages.abs().mean(), "score": scores.mean()}

    @torch.no_grad()
    def preferences(self, batch: DistillBatch) -> tuple[Tensor, Tensor]:
        """The student's data predictions at one step of its deterministic rollout, and the advantages of its ends."""
        steps = list(iterate(self.student, batch.noise, self.sigmas, batch.prompts))
        z = self.scorer.combined(steps[-1].x_next, batch.texts)
        advantages = group_advantages(
            z,
            self.group_size,
            floor=self.settings.std_floor,
            bound=self.settings.advantage_bound,
            reduce=self.reduce,
        )
        with shared_draws():
            chosen = int(torch.randint(len(steps), ()))
        return steps[chosen].x0, advantages

    def after_step(self, step: int) -> None:
        # EMA's warm-up would let the copy follow at once in the first steps, where the clip is needed most
        self.recent.update(step + 1000)

    def metrics(self) -> dict[str, Tensor]:
        return {}

    def frozen_bytes(self) -> dict[str, float]:
        return super().frozen_bytes() | {"surrogate average": float(self.recent.nbytes)}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"recent.{name}": weight for name, weight in self.recent.weights.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, weight in self.recent.weights.items():
            copy_full(weight, state[f"recent.{name}"])
