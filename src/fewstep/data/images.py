"""Images as tensors and as PIL images, one by one and in grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.machine import reading


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, ..., H, W] in [0, 1] -> uint8 [B, ..., H, W, 3], rounded as diffusers does."""
    return (images.clamp(0, 1).movedim(1, -1).float() * 255).round().to(torch.uint8)


def read_image(file: Path) -> Tensor:
    """uint8 [H, W, 3]. Raises: UserError if the file cannot be read."""
    with reading(file), Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


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
        images: [B, 3, H, W] in [0, 1], or uint8 [B, H, W, 3].
    """
    if images.dtype != torch.uint8:
        images = to_uint8(images)
    count, height, width, _ = images.shape
    columns = min(columns, count)
    total_width, total_height = grid_size(count, columns, height, width, gap)
    canvas = torch.full((total_height, total_width, 3), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return to_pil(canvas)
