"""The mean-variance regularizer (arXiv 2511.22677, eq. 7): stable, and blind to content."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fewstep.core.method import Shard
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup

MEASURED_LATENTS = 512  # real latents that the targets are measured on, at least


def mean_variance(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """``mean_i 1/2 [ (s_i^2 + (m_i - m*)^2) / s*^2 - 1 - log(s_i^2 / s*^2) ]``.

    The KL divergence of each sample's own Gaussian (mean m_i and deviation s_i over its elements) from the target's.

    Args:
        x: [B, C, ..., H, W].
        mean, std: the targets m* and s*.
    """
    flat = x.flatten(1)
    variance = flat.var(dim=1, correction=0).clamp(min=1e-8)
    ratio = variance / std**2
    return 0.5 * (ratio + (flat.mean(dim=1) - mean).square() / std**2 - 1 - ratio.log()).mean()


@loss_terms.register("mean_variance")
class MeanVariance(RegularizerTerm):
    """Mean and deviation of each sample are held to those of real latents, measured when the term is built."""

    measures_real = True

    def __init__(self, mean: Tensor | float, std: Tensor | float) -> None:
        self.mean, self.std = mean, std

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/mean_variance"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        batches = -(-MEASURED_LATENTS // setup.batch_size)
        real = setup.sources["real"]
        latents = torch.cat([real(position, Shard()).real for position in range(batches)]).flatten(1)
        return cls(latents.mean(), latents.var(dim=1, correction=0).mean().sqrt())

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        assert sample is not None
        return mean_variance(sample.x0, self.mean, self.std)
