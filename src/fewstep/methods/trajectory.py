"""Trajectory distillation: the student's few long steps are held to the teacher's many short ones.

The regression of arXiv 2101.02388 (knowledge distillation of deterministic samplers) for all states along the way:
``sum_t ||x_t_student - x_t_teacher||^2``. Student and teacher start from the same noise; each of the student's
states is compared with where the teacher was at that level, and gradients run through the whole rollout. It gives no
sharper images than the mean over what the teacher might have done, but it is stable and brings the student near.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.method import Method, Trainable
from fewstep.core.samplers import iterate
from fewstep.data.batch import DistillBatch


@dataclass(frozen=True)
class TrajectorySettings:
    """sigmas: the student's noise levels from 1 to the terminal 0."""

    sigmas: tuple[float, ...]


def trajectory_mse(student: Denoiser, batch: DistillBatch, sigmas: Sequence[float]) -> list[Tensor]:
    """Mean squared distance of each of the student's states from the teacher's, K scalars with gradient.

    Args:
        batch: with the teacher's states.
        sigmas: the student's noise levels from 1 to the terminal 0.
    """
    assert batch.states is not None
    steps = iterate(student, batch.noise, sigmas, batch.prompts)
    return [(step.x_next - batch.states[:, step.index]).square().mean() for step in steps]


class TrajectoryDistillation(Method):
    """One trainable, the student. Batches bring the teacher's states."""

    def __init__(self, student: nn.Module, settings: TrajectorySettings) -> None:
        self.student, self.settings = student, settings
        self.trainables = [Trainable("student", student, self.student_loss)]

    def student_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over steps of the mean squared distance of the states, and each of them as a metric."""
        distances = trajectory_mse(self.student, batch, self.settings.sigmas)
        metrics = {f"state_{k}": distance.detach() for k, distance in enumerate(distances, start=1)}
        return torch.stack(distances).sum(), metrics
