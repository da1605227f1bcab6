"""Wan's latents: of an image, or of a video whose frames after the first are compressed in groups; normalized by
channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Images [B, 3, H, W] or videos [B, 3, 4 k + 1, H, W] in [0, 1] -> latents [B, C, k + 1, H/8, W/8] in fp32: the
    posterior's mode. An image is a video of one frame."""
    video = pixels[:, :, None] if pixels.ndim == 4 else pixels
    latents = vae.encode((video * 2 - 1).to(vae.dtype)).latent_dist.mode()
    mean, deviation = _statistics(vae, latents.device)
    return (latents.float() - mean) / deviation


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, k + 1, H/8, W/8] -> videos [B, 3, 4 k + 1, H, W] in [0, 1], images [B, 3, H, W] if k is 0;
    gradients pass, except where a pixel is clipped."""
    mean, deviation = _statistics(vae, latents.device)
    decoded: Tensor = vae.decode((latents.float() * deviation + mean).to(vae.dtype)).sample
    pixels = (decoded.float() / 2 + 0.5).clamp(0, 1)
    return pixels[:, :, 0] if latents.shape[2] == 1 else pixels


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, [1, C, 1, 1, 1] in fp32."""
    mean, deviation = (
        torch.tensor(vae.config[name], device=device).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return mean, deviation
