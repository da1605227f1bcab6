"""Decoupled-DMD (arXiv 2511.22677) as the regularizer of a LoRA: the student stays a few-step model while it learns.

One run trains three adapters. Flow matching teaches teacher + "teacher" the user's images: a multi-step model has no
few-step ability to lose. CFG augmentation and distribution matching move the samples of student + "lora" towards that
teacher, as in a distillation, with teacher + "fake_score" as the fake score. The student is never trained on a real
image, only on its own samples, in its own few steps.

With ``lora``, a LoRA of the teacher that was trained before is distilled into the student's adapter ("transported").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import GuidanceScale, Updates
from fewstep.config.lora_recipe import LoraMethodConfig, LoraRecipe, TimestepSettings
from fewstep.config.schedule import Step, resolve_step
from fewstep.core.method import Trainable
from fewstep.core.registry import lora_methods
from fewstep.core.schedules import Constant
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.method import DMD, WeightedTerm
from fewstep.methods.dmd.renoise import Renoise, Schedule
from fewstep.methods.dmd.student_sampler import StudentSampler
from fewstep.methods.dmd.terms.cfg_augmentation import CFGAugmentation
from fewstep.methods.dmd.terms.distribution_matching import DistributionMatching
from fewstep.methods.lora.base import LoraMethod, LoraSetup
from fewstep.methods.lora.flow_matching import FLOW_MATCHING, weighted_flow_matching

SIGMA_RANGE = (0.02, 0.98)  # of noise levels, as in a distillation
NORM_EPS = 0.1  # lower bound of the per-sample normalizers, likewise


class DecoupledDMDConfig(LoraMethodConfig):
    """The config section of method decoupled_dmd."""

    name: Literal["decoupled_dmd"]
    teacher: str = Field(description="The multi-step model that the student was distilled from.")
    lora: str | None = Field(
        None,
        description="LoRA file of the teacher, trained before: the student learns it, and the teacher learns nothing. "
        "null trains the teacher's in the same run.",
    )
    guidance_scale: GuidanceScale = Field(
        3.0, description="Of CFG augmentation, as in x_cond + g (x_cond - x_null); that of the student's distillation."
    )
    renoise: Schedule = Field("hybrid", description="The renoise schedule of CA and DM.")
    fake_score_updates: Updates = Field(default=1, description="Updates of the fake score for each of the student.")
    teacher_updates: Updates = Field(default=1, description="Updates of the teacher for each of the student.")
    student_start: Step = Field(
        "25%", description="Steps before the student's first update, in which teacher and fake score learn alone."
    )

    def trainable_parts(self) -> list[str]:
        return ["lora", *self.teacher_adapters]

    @property
    def teacher_model(self) -> str:
        return self.teacher

    @property
    def teacher_lora(self) -> str | None:
        return self.lora

    @property
    def teacher_adapters(self) -> list[str]:
        return ["teacher", "fake_score"] if self.lora is None else ["fake_score"]

    def check(self, recipe: LoraRecipe) -> None:
        if resolve_step(self.student_start, recipe.train.steps) >= recipe.train.steps:
            raise ValueError("method.student_start: the student would not be trained")


@lora_methods.register("decoupled_dmd")
class DecoupledDMDLora(LoraMethod):
    """
    Args:
        teacher: the multi-step model with its adapter.
        dmd: the distillation of that teacher into the student.
        timesteps: of the teacher's flow matching; ``shift``: of its sampler.
        updates: of the teacher in each step; 0 for one that is not trained.
        start: steps before the student's first update.
    """

    def __init__(
        self, teacher: nn.Module, dmd: DMD, timesteps: TimestepSettings, shift: float, updates: int = 1, start: int = 0
    ) -> None:
        self.teacher, self.dmd, self.timesteps, self.shift = teacher, dmd, timesteps, shift
        student, *others = dmd.trainables
        self.trainables = [replace(student, name="lora", start_step=start), *others]
        if updates:
            learner = Trainable("teacher", teacher, self.teacher_loss, updates, loss_meaning=FLOW_MATCHING)
            self.trainables = [learner, *self.trainables]

    @classmethod
    def config_model(cls) -> type[DecoupledDMDConfig]:
        return DecoupledDMDConfig

    @classmethod
    def build(cls, setup: LoraSetup) -> Self:
        recipe, models, config = setup.recipe, setup.models, setup.recipe.method
        assert isinstance(config, DecoupledDMDConfig)
        teacher, fake_score = (models.teacher_denoisers[name] for name in ("teacher", "fake_score"))
        sampling, shift = models.model.generation_config, models.model.shift
        renoise = Renoise(config.renoise, shift, *SIGMA_RANGE)
        sampler = StudentSampler(
            models.denoiser, models.student_levels(), shift, "fixed", sampling.sampler, sampling.eta
        )
        ca = CFGAugmentation(config.guidance_scale + 1, NORM_EPS)
        dm = DistributionMatching(
            *(teacher, models.denoiser, fake_score, renoise, sampler.fresh),
            eps=NORM_EPS,
            updates=config.fake_score_updates,
        )
        terms = {
            "cfg_augmentation": WeightedTerm(ca, Constant(1.0)),
            "distribution_matching": WeightedTerm(dm, Constant(1.0)),
        }
        dmd = DMD(teacher, sampler, setup.null, renoise, terms, recipe.train.steps)
        start = resolve_step(config.student_start, recipe.train.steps)
        updates = config.teacher_updates if config.lora is None else 0
        return cls(teacher, dmd, recipe.timesteps, shift, updates, start)

    def teacher_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching of the teacher on the batch's latents."""
        return weighted_flow_matching(self.teacher, batch, self.timesteps, self.shift)

    def before_step(self, step: int) -> None:
        self.dmd.before_step(step)

    def after_step(self, step: int) -> dict[str, float]:
        return self.dmd.after_step(step)

    def collect(self, batch: DistillBatch) -> Any:
        return self.dmd.collect(batch)

    def state_dict(self) -> dict[str, Tensor]:
        return self.dmd.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.dmd.load_state_dict(state)
