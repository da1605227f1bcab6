"""FLUX.2's latents: 2 x 2 pixels of the autoencoder's are one with four times the channels, normalized by channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 2  # latent pixels of a side that are one token


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> latents [B, 4 C, H/16, W/16] in fp32: the posterior's mode."""
    latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
    mean, deviation = _statistics(vae)
    return (pixel_unshuffle(latents.float(), PATCH) - mean) / deviation


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents -> images [B, 3, H, W] in [0, 1]; gradients pass, except where a pixel is clipped."""
    mean, deviation = _statistics(vae)
    packed = (latents.float() * deviation + mean).to(vae.dtype)
    decoded: Tensor = vae.decode(pixel_shuffle(packed, PATCH)).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, [1, 4 C, 1, 1] in fp32, from the batch norm that was trained with it."""
    norm = vae.bn
    variance = norm.running_var.float() + vae.config.batch_norm_eps
    return norm.running_mean.float().view(1, -1, 1, 1), torch.sqrt(variance).view(1, -1, 1, 1)
