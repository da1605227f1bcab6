"""A loss term of method dmd in one file, for the test that adds a term: it holds the norm of the student's latents."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field
from torch import Tensor

from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd import RegularizerTerm, StudentSample
from fewstep.methods.dmd.terms.base import TermSettings, TermSetup


class LatentNormSettings(TermSettings):
    target: Annotated[float, Field(gt=0)] = Field(1.0, description="Root mean square that samples are held to.")


@loss_terms.register("latent_norm")
class LatentNorm(RegularizerTerm):
    Settings = LatentNormSettings

    def __init__(self, target: float) -> None:
        self.target = target

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, LatentNormSettings)
        return cls(settings.target)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        assert sample is not None
        return (sample.x0.square().mean(dim=tuple(range(1, sample.x0.ndim))).sqrt() - self.target).square().mean()
