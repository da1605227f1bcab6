"""Images as tensors and as PIL images, one by one and in grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.machine import reading

STRIP = 4  # frames of a video in a strip


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, ..., H, W] in [0, 1] -> uint8 [B, ..., H, W, 3], rounded as diffusers does."""
    return (images.clamp(0, 1).movedim(1, -1).float() * 255).round().to(torch.uint8)


def read_image(file: Path, advice: str = "") -> Tensor:
    """uint8 [H, W, 3]. Raises: UserError if the file cannot be read, with what to do about it."""
    with reading(file, advice), Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def strip_length(frames: int) -> int:
    """How many frames of a video a :func:`strip` shows."""
    return min(frames, STRIP)


def strip(images: Tensor) -> Tensor:
    """Videos as images: a few of their frames side by side, from the first to the last. Images are left as they are.

    Args:
        images: uint8 [B, H, W, 3], or videos [B, F, H, W, 3].

    Returns:
        uint8 [B, H, W', 3].
    """
    if images.ndim == 4:
        return images
    frames = images.shape[1]
    chosen = torch.linspace(0, frames - 1, strip_length(frames)).round().long()
    return images[:, chosen].transpose(1, 2).flatten(2, 3)


def middle_frame(images: Tensor) -> Tensor:
    """The frame in the middle of videos [B, F, H, W, 3], for what measures images; images [B, H, W, 3] as they are."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [H, W, 3] -> a PIL image."""
    return Image.fromarray(np.ascontiguousarray(image.cpu().numpy()))


def grid_size(count: int, columns: int, height: int, width: int, gap: int = 2) -> tuple[int, int]:
    """Width and height in pixels of a :func:`grid` of ``count`` images of these sides."""
    columns = min(columns, count)
    rows = -(-count // columns)
    return columns * (width + gap) - gap, rows * (height + gap) - gap


def grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Arrange images in rows of ``columns``, ``gap`` white pixels apart.

    Args:
        images: [B, 3, H, W] in [0, 1], or uint8 [B, H, W, 3]; videos, with a dimension of frames, are shown as strips.
    """
    images = strip(images if images.dtype == torch.uint8 else to_uint8(images))
    count, height, width, _ = images.shape
    columns = min(columns, count)
    total_width, total_height = grid_size(count, columns, height, width, gap)
    canvas = torch.full((total_height, total_width, 3), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return to_pil(canvas)
