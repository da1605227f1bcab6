"""Trajectory distillation: the student's few long steps are held to the teacher's many short ones.

The regression of arXiv 2101.02388 (knowledge distillation of deterministic samplers) for all states of the rollout:
``sum_k ||x_k_student - x_k_teacher||^2``. Student and teacher start from the same noise; each state of the student is
compared with the teacher's at that noise level, and gradients flow through the whole rollout. It is stable and fast,
and no sharper than the mean of the teacher's possible outputs. A student of several numbers of steps is trained at one
of them in each update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn

from fewstep.config.method import MethodConfig
from fewstep.core import flow
from fewstep.core.denoiser import Denoiser
from fewstep.core.method import BatchSource, Trainable
from fewstep.core.registry import methods
from fewstep.core.samplers import iterate
from fewstep.data.batch import DistillBatch
from fewstep.data.teacher_trajectories import open_trajectory_cache, teacher_batches
from fewstep.methods.base import DataSetup, DistillMethod, MethodSetup

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage


class TrajectoryConfig(MethodConfig):
    """The config section of method trajectory."""

    name: Literal["trajectory"]

    @property
    def samples_teacher(self) -> bool:
        return True

    def metric_names(self, stage: Stage) -> set[str]:
        return {f"student/trajectory_mse_{k}" for k in range(1, stage.student.trajectory_steps + 1)}

    def check(self, stage: Stage) -> None:
        stage.student.check_trajectory("method trajectory")


def trajectory_mse(student: Denoiser, batch: DistillBatch, sigmas: Sequence[float]) -> dict[int, Tensor]:
    """Mean squared distance of each of the student's states from the teacher's, K scalars with gradient, by the number
    of the teacher's state from 1.

    Args:
        batch: with N states of the teacher, a multiple of K; every N/K-th is compared.
        sigmas: the student's K noise levels from 1 down, with the terminal 0.
    """
    assert batch.states is not None
    stride = batch.states.shape[1] // (len(sigmas) - 1)
    found = {}
    for step in iterate(student, batch.noise, sigmas, batch.prompts):
        state = (step.index + 1) * stride
        found[state] = (step.x_next - batch.states[:, state - 1]).square().mean()
    return found


def drawn_sigmas(schedules: Sequence[Sequence[float]], longest: bool = False) -> Sequence[float]:
    """One of the noise levels that the student is trained at, all as likely; with ``longest`` those of the most steps,
    which take the most memory."""
    if longest:
        return max(schedules, key=len)
    return schedules[int(torch.randint(len(schedules), ()))] if len(schedules) > 1 else schedules[0]


@methods.register("trajectory")
class TrajectoryDistillation(DistillMethod):
    """Trains the student alone, on batches with the teacher's states.

    Args:
        schedules: for each number of steps that the student is trained for, its noise levels from 1 down, with the
            terminal 0.
        longest: always the most steps, for a plan of the memory.
    """

    def __init__(self, student: nn.Module, schedules: Sequence[Sequence[float]], longest: bool = False) -> None:
        self.student, self.schedules, self.longest = student, schedules, longest
        self.trainables = [
            Trainable(
                *("student", student, self.compute_student_loss),
                loss_meaning="squared distance to the teacher's states; falls",
            )
        ]

    @classmethod
    def config_model(cls) -> type[TrajectoryConfig]:
        return TrajectoryConfig

    @classmethod
    def batch_sources(cls, setup: DataSetup) -> dict[str, BatchSource]:
        cache = open_trajectory_cache(setup.recipe, setup.teacher, setup.cache, setup.prompts)
        train = setup.recipe.train
        return {"train": teacher_batches(cache, setup.teacher, train.batch_size, train.seed)}

    @classmethod
    def build(cls, setup: MethodSetup) -> Self:
        shift = setup.models.teacher.shift
        schedules = [flow.sigmas_from_timesteps(levels, shift) for levels in setup.recipe.student.trained_levels]
        planned = setup.dist.device.type == "meta" and not setup.count_passes
        return cls(setup.models.student.denoiser, schedules, longest=planned)

    def compute_student_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over steps of the mean squared distance of the states, and each of them as a metric."""
        distances = trajectory_mse(self.student, batch, drawn_sigmas(self.schedules, self.longest))
        metrics = {f"trajectory_mse_{state}": distance.detach() for state, distance in distances.items()}
        return torch.stack(list(distances.values())).sum(), metrics
