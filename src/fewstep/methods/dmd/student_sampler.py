"""Student samples at random anchors, reached by backward simulation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.core import flow
from fewstep.core.denoiser import predict_x0
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.rollout import (
    AnchorSchedule,
    GradientSteps,
    Sampler,
    backward_simulation,
    sample_rollout_timesteps,
)
from fewstep.methods.dmd.terms.base import StudentSample


class StudentSampler:
    """Draws an anchor for the whole batch, simulates the student down to it, and predicts x0 there.

    Args:
        levels: the student's pre-shift noise levels, from 1 down, without the 0.
        timestep_sampling: "fixed", or "continuous": levels drawn anew each time (CDM, arXiv 2605.06376).
        sampler, eta: how the student is run at inference.
        gradient_steps: "last": gradients reach the last step of a rollout alone; "all": every step.
        trained_levels: likewise for each number of steps that it is trained for, one of which is drawn for each batch;
            None is ``levels`` alone.
        first_step_weight: how often the first step's own prediction is trained, relative to each later one's.
    """

    def __init__(
        self,
        student: nn.Module,
        levels: Sequence[float],
        shift: float,
        timestep_sampling: AnchorSchedule = "fixed",
        sampler: Sampler = "euler",
        eta: float = 1.0,
        trained_levels: Sequence[Sequence[float]] | None = None,
        gradient_steps: GradientSteps = "last",
        first_step_weight: float = 1.0,
    ) -> None:
        self.student, self.levels, self.shift = student, list(levels), shift
        self.timestep_sampling, self.sampler, self.eta = timestep_sampling, sampler, eta
        self.gradient_steps, self.first_step_weight = gradient_steps, first_step_weight
        self.trained_levels = [self.levels] if trained_levels is None else [list(each) for each in trained_levels]

    @property
    def sigmas(self) -> list[float]:
        """The student's noise levels after the shift, with the terminal 0."""
        return flow.sigmas_from_timesteps(self.levels, self.shift)

    @property
    def trained_sigmas(self) -> list[list[float]]:
        """``sigmas`` for each number of steps that it is trained for."""
        return [flow.sigmas_from_timesteps(levels, self.shift) for levels in self.trained_levels]

    def __call__(self, batch: DistillBatch) -> StudentSample:
        """Samples with gradient through the last prediction, or all of them."""
        levels = self.trained_levels[0]
        if batch.steps is not None:
            levels = next(each for each in self.trained_levels if len(each) == batch.steps)
        elif len(self.trained_levels) > 1:
            levels = self.trained_levels[int(torch.randint(len(self.trained_levels), ()))]
        anchors = sample_rollout_timesteps(levels, self.timestep_sampling, self.first_step_weight)
        sigmas = [flow.shift_sigma(u, self.shift) for u in anchors]
        z = self._simulate(batch, sigmas)
        sigma = torch.full((len(z),), sigmas[-1], device=z.device)
        x0 = predict_x0(self.student, z, sigma, batch.prompts)
        return StudentSample(x0, z.detach(), sigma, torch.full_like(sigma, anchors[-1]), batch.prompts)

    def endpoint(self, batch: DistillBatch) -> Tensor:
        """Samples x0 [B, C, ..., H, W] at the end of the whole rollout at inference's levels, with gradient as
        in a call."""
        sigmas = self.sigmas[:-1]
        z = self._simulate(batch, sigmas)
        return predict_x0(self.student, z, torch.full((len(z),), sigmas[-1], device=z.device), batch.prompts)

    def _simulate(self, batch: DistillBatch, sigmas: Sequence[float]) -> Tensor:
        """The student's input at the last of ``sigmas``."""
        every = self.gradient_steps == "all"
        return backward_simulation(self.student, batch.noise, sigmas, batch.prompts, self.sampler, self.eta, every)

    @torch.no_grad()
    def fresh(self, batch: DistillBatch) -> Tensor:
        """Samples x0 [B, C, ..., H, W] without gradient."""
        return self(batch).x0
