"""The MMD regularizer: batches of the student's and of real samples should have equal features in the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from fewstep.core import flow
from fewstep.core.denoiser import FeatureExtractor
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup

if TYPE_CHECKING:
    from fewstep.config.recipe import Stage
    from fewstep.methods.dmd.config import DMDConfig


def feature_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two batches of features [B, D], unbiased; three Gaussian kernels around the
    median distance (Gretton et al. 2012, eq. 3)."""
    both = torch.cat([a, b])
    distance = torch.cdist(both, both).square()
    # all but the diagonal; a mask would have no shape on the meta device
    others = distance.detach().flatten()[1:].unflatten(0, (len(both) - 1, len(both) + 1))[:, :-1]
    median = others.median().clamp(min=1e-12)
    kernel = torch.stack([torch.exp(-distance / (scale * median)) for scale in (0.5, 1.0, 2.0)]).mean(dim=0)
    n = len(a)

    def within(block: Tensor) -> Tensor:
        return (block.sum() - block.diagonal().sum()) / (n * (n - 1))

    return within(kernel[:n, :n]) + within(kernel[n:, n:]) - 2 * kernel[:n, n:].mean()


class MMDSettings(TermSettings):
    """Settings of the MMD term."""

    def check(self, stage: Stage, method: DMDConfig) -> None:
        if stage.train.batch_size < 2:
            raise ValueError("method.terms.mmd compares samples within a batch: set train.batch_size to 2 or more")


@loss_terms.register("mmd")
class FeatureMMD(RegularizerTerm):
    """
    all_gather: this process's rows of a batch -> the whole batch's, with gradient.
    """

    Settings = MMDSettings
    requires_real = True

    def __init__(
        self, extractor: FeatureExtractor, renoise: Renoise, all_gather: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> None:
        self.extractor, self.renoise, self.all_gather = extractor, renoise, all_gather

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/mmd"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        return cls(setup.teacher.denoiser, setup.renoise, setup.dist.all_gather)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        assert sample is not None
        sigma = self.renoise.sample_sigma(sample.x0)
        eps = torch.randn_like(sample.x0)
        student, real = (
            self.all_gather(self.extractor.features(flow.add_noise(x, sigma, eps), sigma, batch.prompts).mean(dim=1))
            for x in (sample.x0, batch.real)
        )
        return feature_mmd(student, real.detach())
