"""How many denoiser passes a method takes in a step, counted on stand-ins that cost nothing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import MIDDLE
from fewstep.core.method import Method
from fewstep.data.batch import DistillBatch
from fewstep.methods.base import DistillMethod, MethodSetup

DRAWS = 64  # steps that are averaged: anchors are random


@dataclass
class Passes:
    """Denoiser passes, of all models together.

    Attributes:
        forwards, backwards: calls.
        forward_batches: forwards in units of one batch, as a call may take several batches at once.
    """

    forwards: float = 0.0
    backwards: float = 0.0
    forward_batches: float = 0.0


class CountingDenoiser(nn.Module):
    """Counts its passes; its velocity is its input times a parameter."""

    def __init__(self, passes: Passes, batch_size: int, feature_dim: int, trained: bool) -> None:
        super().__init__()
        self.passes, self.batch_size, self.feature_dim = passes, batch_size, feature_dim
        self.scale = nn.Parameter(torch.ones((), device="meta"), requires_grad=trained)

    def forward(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        self._count(x)
        return x * self.scale

    def features(self, x: Tensor, sigma: Tensor, prompts: EncodedPrompts, depths: Sequence[float] = MIDDLE) -> Tensor:
        self._count(x)
        width = len(depths) * self.feature_dim
        return (x.flatten(1).mean(dim=1) * self.scale)[:, None, None].expand(-1, 4, width)

    def _count(self, x: Tensor) -> None:
        self.passes.forwards += 1
        self.passes.forward_batches += len(x) / self.batch_size
        if torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad):
            self.passes.backwards += 1


def count_passes(method_class: type[DistillMethod], setup: MethodSetup, batch: DistillBatch) -> Passes:
    """The mean passes of one step in which all trainable parts are trained.

    Args:
        setup: with models on the meta device; they are not called.
        batch: on the meta device.
    """
    passes, models = Passes(), setup.models
    dim = models.teacher.denoiser.feature_dim

    def stand_in(trained: bool) -> CountingDenoiser:
        return CountingDenoiser(passes, len(batch), dim, trained)

    teacher, student = copy.copy(models.teacher), copy.copy(models.student)
    teacher.denoiser, student.denoiser = stand_in(False), stand_in(True)  # type: ignore[assignment]
    extra: dict[str, nn.Module] = {name: stand_in(True) for name in models.extra}
    copies: dict[str, nn.Module] = {name: stand_in(False) for name in models.copies}
    changed = replace(models, teacher=teacher, student=student, extra=extra, copies=copies)
    method = method_class.build(replace(setup, models=changed, count_passes=True))
    method.before_step(setup.recipe.train.steps - 1)
    return average_passes(method, batch, passes)


def average_passes(method: Method, batch: DistillBatch, passes: Passes) -> Passes:
    """The mean passes of one step of a method on stand-ins, which count theirs in ``passes``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(DRAWS):
            collected = None
            if any(part.uses_collected for part in method.trainables):
                with torch.no_grad():
                    collected = method.collect(batch)
            for part in method.trainables:
                for _ in range(part.updates_per_step):
                    part.loss(collected if part.uses_collected else batch)
    return Passes(passes.forwards / DRAWS, passes.backwards / DRAWS, passes.forward_batches / DRAWS)
