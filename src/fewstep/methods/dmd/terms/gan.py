"""The GAN term: a small discriminator head on the frozen teacher's middle layer.

DMD2 (arXiv 2405.14867, section 4.3), with noise on what is classified. The penalty is the approximate R1 of APT
(arXiv 2501.08316, eq. 4), which needs no second derivatives. Real samples are data, or the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.core import flow
from fewstep.core.denoiser import FeatureExtractor
from fewstep.core.method import Trainable
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup


class DiscriminatorHead(nn.Module):
    """Features [B, L, D] -> logits [B]; positive is real."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(F.silu(self.inner(self.norm(features)))).mean(dim=(1, 2))


class GANSettings(TermSettings):
    """Settings of the GAN term."""

    r1_weight: Annotated[float, Field(ge=0)] = Field(100.0, description="Weight of the approximate R1 penalty.")
    r1_sigma: Annotated[float, Field(gt=0)] = Field(
        0.01, description="Deviation of the noise that the penalty adds to real latents."
    )


@loss_terms.register("gan")
class GAN(RegularizerTerm):
    """
    extractor: the teacher; its parameters take no gradient, its input does.
    head: the discriminator. sample: batch -> fresh student samples, without gradient.
    """

    Settings = GANSettings
    requires_real = True
    trainable_names = ("discriminator",)

    def __init__(
        self,
        extractor: FeatureExtractor,
        head: DiscriminatorHead,
        renoise: Renoise,
        sample: Callable[[DistillBatch], Tensor],
        r1_weight: float = 100.0,
        r1_sigma: float = 0.01,
        start_step: int = 0,
    ) -> None:
        self.extractor, self.head, self.renoise, self.sample = extractor, head, renoise, sample
        self.r1_weight, self.r1_sigma, self.start_step = r1_weight, r1_sigma, start_step

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/gan", "discriminator/accuracy", "discriminator/r1"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, GANSettings)
        head = DiscriminatorHead(setup.teacher.denoiser.feature_dim).to(setup.teacher.device)
        setup.dist.broadcast(head)
        start = setup.config.fake_score_start_step(setup.total_steps)
        teacher = setup.teacher.denoiser
        return cls(teacher, head, setup.renoise, setup.sample, settings.r1_weight, settings.r1_sigma, start)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        """The student's: ``softplus(-D(x0))``, non-saturating."""
        assert sample is not None
        sigma = self.renoise.sample_sigma(sample.x0)
        noisy = flow.add_noise(sample.x0, sigma, torch.randn_like(sample.x0))
        features = self.extractor.features(noisy, sigma, batch.prompts)
        frozen = {name: weight.detach() for name, weight in self.head.named_parameters()}
        return F.softplus(-functional_call(self.head, frozen, features)).mean()

    def trainables(self) -> list[Trainable]:
        return [
            Trainable(
                *("discriminator", self.head, self.compute_discriminator_loss),
                start_step=self.start_step,
                loss_meaning="1.39 where it cannot tell real from generated images, 0 where it always can",
            )
        ]

    def compute_discriminator_loss(self, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """``softplus(D(x0)) + softplus(-D(real)) + r1_weight (D(real) - D(real + noise))^2``."""
        x0, real = self.sample(batch), batch.real
        sigma = self.renoise.sample_sigma(x0)
        eps = torch.randn_like(x0)
        perturbed = real + self.r1_sigma * torch.randn_like(real)
        with torch.no_grad():
            features = [
                self.extractor.features(flow.add_noise(x, sigma, eps), sigma, batch.prompts)
                for x in (x0, real, perturbed)
            ]
        d_fake, d_real, d_perturbed = (self.head(each) for each in features)
        penalty = (d_real - d_perturbed).square().mean()
        loss = F.softplus(d_fake).mean() + F.softplus(-d_real).mean() + self.r1_weight * penalty
        accuracy = ((d_fake < 0).float().mean() + (d_real > 0).float().mean()) / 2
        return loss, {"accuracy": accuracy, "r1": penalty.detach()}
