"""A patch discriminator for the micro autoencoder: adversarial and feature matching losses of decoded images.

Absolute errors of pixels are least for a blurred image wherever the latents leave a choice; a discriminator of patches
is not satisfied with blur (PatchGAN, arXiv 1611.07004, section 3.2; as in the autoencoder of arXiv 2012.09841).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class PatchDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> logits [B, 1, H / 8, W / 8]; positive is real."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 4, stride=2, padding=1),
                nn.GroupNorm(8, after) if before > 3 else nn.Identity(),
                nn.LeakyReLU(0.2),
            )
            for before, after in pairwise(widths)
        )
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the features after each layer."""
        features = [images]
        for layer in self.layers:
            features.append(layer(features[-1]))
        return self.out(features[-1]), features[1:]


def discriminator_loss(network: PatchDiscriminator, real: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge loss (arXiv 1705.02894, eq. 9), and the accuracy of the logits' signs."""
    logits, _ = network(torch.cat([real, decoded]))
    on_real, on_decoded = logits.float().chunk(2)
    loss = F.relu(1 - on_real).mean() + F.relu(1 + on_decoded).mean()
    accuracy = ((on_real > 0).float().mean() + (on_decoded < 0).float().mean()) / 2
    return loss, accuracy.detach()


def adversarial_losses(network: PatchDiscriminator, real: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's hinge loss, and feature matching: the mean absolute difference of features relative to their size,
    averaged over layers (arXiv 1711.11585, eq. 4). The discriminator gets no gradient."""
    frozen = {name: weight.detach() for name, weight in network.named_parameters()}
    logits, features = functional_call(network, frozen, (torch.cat([decoded, real]),))
    matching = torch.zeros((), device=real.device)
    for layer in features:
        of_decoded, of_real = layer.float().chunk(2)
        of_real = of_real.detach()
        matching = matching + (of_decoded - of_real).abs().mean() / of_real.abs().mean()
    return -logits[: len(decoded)].float().mean(), matching / len(features)
