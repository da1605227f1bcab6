"""Changes of images that a reward must forgive, and changes that it must punish."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def slightly_changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images that are as good: shifted by up to 4 px, scaled by 6% and tinted by 0.03 at most."""
    count = len(images)
    scale = 1 + 0.06 * (2 * torch.rand(count, generator=generator) - 1)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = 0.12 * (2 * torch.rand(count, 2, generator=generator) - 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    tint = 0.03 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    return (moved + tint).clamp(0, 1)


def degrade(images: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Images that are worse, in turn blurred (Gaussian, up to 3.5 px), noisy (up to 0.3), blotchy, and washed out.

    Args:
        severity: [N] in [0, 1], from hardly to badly.
    """
    strength = severity.view(-1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator)
    low = F.interpolate(noise[:, :, ::8, ::8], images.shape[-2:], mode="bicubic")
    versions = [
        blur(images, 0.5 + 3 * severity),
        images + (0.02 + 0.28 * strength) * noise,
        blur(images, 0.5 + 3 * severity) + 0.1 * strength * low,
        0.5 + (images - 0.5) * (1 - 0.6 * strength),
    ]
    rows = torch.arange(len(images))
    return torch.stack(versions)[rows % len(versions), rows].clamp(0, 1)


def blur(images: Tensor, radius: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of ``radius`` [N] pixels, each image its own."""
    reach = 10
    distance = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (distance / radius[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    flat = F.pad(images, (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    channels = flat.shape[1]
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=channels)
    return F.conv2d(flat, kernel[:, None, :, None], groups=channels)[0].unflatten(0, images.shape[:2])
