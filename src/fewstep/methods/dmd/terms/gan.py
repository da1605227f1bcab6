"""The GAN term: small discriminator heads on the frozen teacher's layers.

DMD2 (arXiv 2405.14867, section 4.3), with noise on what is classified: one head on the middle layer, or AdvDMD's heads
on several, with a logit for each token. The penalty is the approximate R1 of APT (arXiv 2501.08316, eq. 4), which needs
no second derivatives. Real samples are data, or the teacher's.
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
from fewstep.core.denoiser import MIDDLE, FeatureExtractor
from fewstep.core.method import Trainable
from fewstep.core.registry import loss_terms
from fewstep.data.batch import DistillBatch
from fewstep.methods.adversarial.heads import Depths, DiscriminatorHeads
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.base import RegularizerTerm, StudentSample, TermSettings, TermSetup


class DiscriminatorHead(nn.Module):
    """Features [B, L, D] -> logits [B]; positive is real. The noise level ``sigma`` is not used: the features depend on
    it."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        return self.out(F.silu(self.inner(self.norm(features)))).mean(dim=(1, 2))


class GANSettings(TermSettings):
    """Settings of the GAN term."""

    depths: Depths | None = Field(
        None,
        description="Shares of the teacher's layers, ascending, after each of which there is a head with a logit for "
        "each token, as in AdvDMD; null is one head and one logit on the middle layer.",
    )
    sigma_max: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Highest noise level at which images are compared, within renoise's: what is sharp shows at low "
        "ones, what is drawn at high ones.",
    )
    r1_weight: Annotated[float, Field(ge=0)] = Field(100.0, description="Weight of the approximate R1 penalty.")
    r1_sigma: Annotated[float, Field(gt=0)] = Field(
        0.01, description="Deviation of the noise that the penalty adds to real latents."
    )


@loss_terms.register("gan")
class GAN(RegularizerTerm):
    """
    extractor: the teacher; its parameters take no gradient, its input does.
    head: the discriminator, on the features after ``depths``; a mean is taken over all logits of a sample.
    sample: batch -> fresh student samples, without gradient.
    """

    Settings = GANSettings
    requires_real = True
    trainable_names = ("discriminator",)

    def __init__(
        self,
        extractor: FeatureExtractor,
        head: DiscriminatorHead | DiscriminatorHeads,
        renoise: Renoise,
        sample: Callable[[DistillBatch], Tensor],
        settings: GANSettings,
        start_step: int = 0,
    ) -> None:
        self.extractor, self.head, self.renoise, self.sample = extractor, head, renoise, sample
        self.settings, self.start_step = settings, start_step
        self.depths = settings.depths or MIDDLE
        self.highest = flow.unshift_sigma(settings.sigma_max, renoise.shift)

    @classmethod
    def metric_names(cls, settings: TermSettings) -> set[str]:
        return {"student/gan", "discriminator/accuracy", "discriminator/r1"}

    @classmethod
    def build(cls, settings: TermSettings, setup: TermSetup) -> Self:
        assert isinstance(settings, GANSettings)
        teacher, depths = setup.teacher.denoiser, settings.depths
        width = teacher.feature_dim
        head = DiscriminatorHead(width) if depths is None else DiscriminatorHeads(width, len(depths))
        setup.dist.broadcast(head.to(setup.teacher.device))
        start = setup.config.fake_score_start_step(setup.total_steps)
        return cls(teacher, head, setup.renoise, setup.sample, settings, start)

    def sample_sigma(self, x: Tensor) -> Tensor:
        """One sigma for each sample of ``x`` [B, ...]: bounded before the shift, as in the renoise schedules."""
        return self.renoise.sample_sigma(x, self.highest)

    def loss(self, sample: StudentSample | None, batch: DistillBatch) -> Tensor:
        """The student's: ``softplus(-D(x0))``, non-saturating."""
        assert sample is not None
        sigma = self.sample_sigma(sample.x0)
        noisy = flow.add_noise(sample.x0, sigma, torch.randn_like(sample.x0))
        features = self.extractor.features(noisy, sigma, batch.prompts, self.depths)
        frozen = {name: weight.detach() for name, weight in self.head.named_parameters()}
        return F.softplus(-functional_call(self.head, frozen, (features, sigma))).mean()

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
        sigma = self.sample_sigma(x0)
        eps = torch.randn_like(x0)
        perturbed = real + self.settings.r1_sigma * torch.randn_like(real)
        with torch.no_grad():
            features = [
                self.extractor.features(flow.add_noise(x, sigma, eps), sigma, batch.prompts, self.depths)
                for x in (x0, real, perturbed)
            ]
        d_fake, d_real, d_perturbed = (self.head(each, sigma) for each in features)
        penalty = (d_real - d_perturbed).square().mean()
        loss = F.softplus(d_fake).mean() + F.softplus(-d_real).mean() + self.settings.r1_weight * penalty
        fake, judged = (each.detach().reshape(len(x0), -1).mean(dim=1) for each in (d_fake, d_real))
        accuracy = ((fake < 0).float().mean() + (judged > 0).float().mean()) / 2
        return loss, {"accuracy": accuracy, "r1": penalty.detach()}
