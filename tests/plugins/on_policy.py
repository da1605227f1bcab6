"""A training method in one file: on-policy distillation of velocities, for the test that adds a method.

The student is trained at its own rollout states towards the teacher's guided velocity; the states are collected once a
step and shared by two updates. A running mean of the loss is its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from fewstep.config.method import MethodConfig
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.method import BatchSource, Trainable
from fewstep.core.registry import methods
from fewstep.data.batch import DistillBatch
from fewstep.data.prompt_batches import prompt_batches
from fewstep.methods.base import DataSetup, DistillMethod, MethodSetup
from fewstep.methods.dmd.student_sampler import StudentSampler


class OnPolicyConfig(MethodConfig):
    name: Literal["on_policy"]
    guidance_scale: Annotated[float, Field(ge=0)] = Field(2.0, description="The teacher's guidance.")


class Rollout(NamedTuple):
    """States z [B, ...] at sigma [B], and the teacher's velocities there."""

    z: Tensor
    sigma: Tensor
    target: Tensor
    prompts: EncodedPrompts


@methods.register("on_policy")
class OnPolicyDistillation(DistillMethod):
    def __init__(self, teacher: ClassifierFreeGuidance, sampler: StudentSampler) -> None:
        self.teacher, self.sampler = teacher, sampler
        self.mean_loss = torch.zeros(())
        self.trainables = [
            Trainable("student", sampler.student, self.compute_loss, updates_per_step=2, uses_collected=True)
        ]

    @classmethod
    def config_model(cls) -> type[OnPolicyConfig]:
        return OnPolicyConfig

    @classmethod
    def batch_sources(cls, setup: DataSetup) -> dict[str, BatchSource]:
        train = setup.recipe.train
        return {"train": prompt_batches(setup.teacher, setup.prompts, train.batch_size, train.seed)}

    @classmethod
    def build(cls, setup: MethodSetup) -> Self:
        models, config = setup.models, setup.recipe.method
        assert isinstance(config, OnPolicyConfig)
        teacher = ClassifierFreeGuidance(models.teacher.denoiser, setup.null, config.guidance_scale + 1)
        sampler = StudentSampler(models.student.denoiser, setup.recipe.student.levels, models.teacher.shift)
        return cls(teacher, sampler)

    @torch.no_grad()
    def collect(self, batch: DistillBatch) -> Rollout:
        sample = self.sampler(batch)
        target = self.teacher(sample.z, sample.sigma, batch.prompts)
        return Rollout(sample.z, sample.sigma, target, batch.prompts)

    def compute_loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        velocity = self.sampler.student(batch.z, batch.sigma, batch.prompts)
        loss = (velocity - batch.target).square().mean()
        if loss.device.type != "meta":
            self.mean_loss = torch.lerp(self.mean_loss, loss.detach().cpu().float(), 0.1)
        return loss, {}

    def after_step(self, step: int) -> dict[str, float]:
        return {"student/mean_loss": float(self.mean_loss)}

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean_loss": self.mean_loss}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.mean_loss = state["mean_loss"].clone()
