"""Trajectory imitation: the student with its adapter follows the base with a LoRA that was trained on the base.

Both start from the same noise; each state of the student's few steps is compared with the state of the guided base at
that noise level (``methods/trajectory.py``): the adapter learns what the LoRA does, in the student's own steps.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.config.base import GuidanceScale, Updates
from fewstep.config.lora_recipe import LoraMethodConfig
from fewstep.core import flow
from fewstep.core.denoiser import Denoiser
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.method import Trainable
from fewstep.core.registry import lora_methods
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import teacher_trajectory
from fewstep.methods.lora.base import LoraMethod, LoraSetup
from fewstep.methods.trajectory import trajectory_mse


class LoraTrajectoryConfig(LoraMethodConfig):
    """The config section of method trajectory."""

    name: Literal["trajectory"]
    teacher: str = Field(description="The multi-step model that the student was distilled from.")
    lora: str = Field(description="LoRA file that was trained on it.")
    guidance_scale: GuidanceScale = Field(
        3.0, description="The teacher's, as in x_cond + g (x_cond - x_null); that of the student's distillation."
    )
    teacher_steps_per_student_step: Updates = Field(default=6, description="Teacher steps per student step.")

    @property
    def teacher_model(self) -> str:
        return self.teacher

    @property
    def teacher_lora(self) -> str:
        return self.lora


@lora_methods.register("trajectory")
class LoraTrajectory(LoraMethod):
    """
    Args:
        teacher: the guided multi-step model with its LoRA.
        levels: the student's pre-shift noise levels, from 1 down, without the terminal 0.
        substeps: of the teacher, for each of the student.
    """

    def __init__(self, student: nn.Module, teacher: Denoiser, levels: list[float], shift: float, substeps: int) -> None:
        self.student, self.teacher, self.levels, self.shift, self.substeps = student, teacher, levels, shift, substeps
        self.sigmas = flow.sigmas_from_timesteps(levels, shift)
        meaning = "squared distance to the teacher's states; falls"
        self.trainables = [Trainable("lora", student, self.loss, loss_meaning=meaning)]

    @classmethod
    def config_model(cls) -> type[LoraTrajectoryConfig]:
        return LoraTrajectoryConfig

    @classmethod
    def build(cls, setup: LoraSetup) -> Self:
        config, models = setup.recipe.method, setup.models
        assert isinstance(config, LoraTrajectoryConfig)
        teacher: Denoiser = models.teacher_denoisers["teacher"]
        if config.guidance_scale > 0:
            teacher = ClassifierFreeGuidance(teacher, setup.null, 1 + config.guidance_scale)
        substeps = config.teacher_steps_per_student_step
        return cls(models.denoiser, teacher, models.student_levels(), models.model.shift, substeps)

    def loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared distance of the states, from the batch's noise; its images are not used."""
        with torch.no_grad():
            states = teacher_trajectory(
                self.teacher, batch.noise, self.levels, self.substeps, self.shift, batch.prompts
            )
        compared = DistillBatch(batch.noise, batch.prompts, states)
        distances = list(trajectory_mse(self.student, compared, self.sigmas).values())
        return torch.stack(distances).mean(), {"last_state_mse": distances[-1].detach()}
