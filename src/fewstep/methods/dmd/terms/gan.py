"""The GAN shield: a small head on the frozen teacher's middle layer tells the student's images from real ones.

DMD2 (arXiv 2405.14867, section 4.3) with noise on what is judged; the penalty is the approximate R1 of APT
(arXiv 2501.08316, eq. 4), which needs no second derivatives. Real ones are data, or images that the teacher made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.core import flow
from fewstep.core.denoiser import FeatureExtractor
from fewstep.data.batch import DistillBatch
from fewstep.methods.dmd.renoise import Renoise


class DiscriminatorHead(nn.Module):
    """Features [B, L, D] -> logits [B]; positive is real."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(F.silu(self.inner(self.norm(features)))).mean(dim=(1, 2))


class GANTerm:
    """Args:
    extractor: the teacher; its parameters take no gradient, what flows through it to the images does.
    width: D of its features.
    penalty: weight of the approximate R1 penalty.
    spread: deviation of the noise that the penalty puts on real latents.
    """

    name, wants_real = "discriminator", True

    def __init__(
        self, extractor: FeatureExtractor, width: int, renoise: Renoise, penalty: float = 100.0, spread: float = 0.01
    ) -> None:
        self.extractor, self.renoise, self.penalty, self.spread = extractor, renoise, penalty, spread
        self.module = DiscriminatorHead(width)

    def loss(self, x: Tensor, batch: DistillBatch) -> Tensor:
        """The student's: ``softplus(-D(x))``, non-saturating."""
        sigma = self.renoise.sample_sigma(x)
        features = self.extractor.features(flow.add_noise(x, sigma, torch.randn_like(x)), sigma, batch.prompts)
        frozen = {name: weight.detach() for name, weight in self.module.named_parameters()}
        return F.softplus(-functional_call(self.module, frozen, features)).mean()

    def learn(self, x: Tensor, batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's: ``softplus(D(x)) + softplus(-D(real)) + penalty (D(real) - D(real + noise))^2``."""
        real = batch.real
        sigma = self.renoise.sample_sigma(x)
        eps = torch.randn_like(x)
        near = real + self.spread * torch.randn_like(real)
        with torch.no_grad():
            seen = [
                self.extractor.features(flow.add_noise(images, sigma, eps), sigma, batch.prompts)
                for images in (x, real, near)
            ]
        fake, true, moved = (self.module(features) for features in seen)
        smoothness = (true - moved).square().mean()
        loss = F.softplus(fake).mean() + F.softplus(-true).mean() + self.penalty * smoothness
        accuracy = ((fake < 0).float().mean() + (true > 0).float().mean()) / 2
        return loss, {"accuracy": accuracy, "r1": smoothness.detach()}
