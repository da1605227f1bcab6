"""Trajectory MSE: DMD's regression (arXiv 2311.18828, eq. 9) for all states of the student's rollout.

The student's states are held to the teacher's from the same noise; see ``methods/trajectory.py``. Training on this term
alone before CFG augmentation and distribution matching start is a matter of weight schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from fewstep.core.denoiser import Denoiser
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup
from fewstep.methods.trajectory import drawn_sigmas, trajectory_mse

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


class TrajectoryMSESettings(TermSettings):
    """Settings of the trajectory term."""

    def check(self, stage: Stage, method: DMDConfig) -> None:
        if method.real_source != "teacher":
            raise ValueError("method.terms.trajectory_mse needs method.real_source: teacher")
        stage.student.check_trajectory("method.terms.trajectory_mse")


@loss_terms.register("trajectory_mse")
class TrajectoryMSE(RegularizerTerm):
    """
    schedules: for each number of steps that the student is trained for, its noise levels from 1 down, with the
        terminal 0.
    longest: always the most steps, for a plan of the memory.
    """

    Settings = TrajectoryMSESettings
    requires_real = True
    uses_sample = False

    def __init__(self, student: Denoiser, schedules: Sequence[Sequence[float]], longest: bool = False) -> None:
        self.student, self.schedules, self.longest = student, schedules, longest

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/trajectory_mse"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        planned = setup.dist.device.type == "meta" and not setup.count_passes
        return cls(setup.student, setup.trained_sigmas, longest=planned)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        distances = trajectory_mse(self.student, batch, drawn_sigmas(self.schedules, self.longest))
        return torch.stack(list(distances.values())).sum()
