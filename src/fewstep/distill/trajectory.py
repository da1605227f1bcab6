"""Trajectory distillation: the student's few long steps are held to the teacher's many short ones.

The regression of arXiv 2101.02388 (knowledge distillation of deterministic samplers) for all states along the way:
``sum_t ||x_t_student - x_t_teacher||^2``. Student and teacher start from the same noise; each of the student's
states is compared with where the teacher was at that level, and gradients run through the whole rollout. It gives no
sharper images than the mean over what the teacher might have done, but it is stable and brings the student near.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.samplers import step_euler
from fewstep.training.method import Batch, Player


@dataclass(frozen=True)
class TrajectorySettings:
    """sigmas: the student's levels from 1 down, without the final 0."""

    sigmas: tuple[float, ...]


class TrajectoryDistillation:
    """One player, the student. A batch is (noise [B, C, H, W], B encoded prompts, teacher's states [B, K, C, H, W]),
    where state k is the teacher's at the student's level k + 1, and the last one is data."""

    def __init__(self, student: nn.Module, settings: TrajectorySettings) -> None:
        self.student, self.settings = student, settings
        self._players = [Player("student", student, self.student_loss)]

    @property
    def players(self) -> list[Player]:
        return self._players

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over steps of the mean squared distance of the states, and each of them as a metric."""
        x, prompts, states = batch
        levels = [*self.settings.sigmas, 0.0]
        metrics: dict[str, Tensor] = {}
        total = x.new_zeros(())
        for index, sigma in enumerate(levels[:-1]):
            velocity = self.student(x, torch.full((len(x),), sigma, device=x.device), prompts)
            x = step_euler(x, sigma, levels[index + 1], velocity)
            distance = (x - states[:, index]).square().mean()
            metrics[f"state_{index + 1}"] = distance.detach()
            total = total + distance
        return total, metrics

    def after_step(self, step: int) -> dict[str, float]:
        return {}
