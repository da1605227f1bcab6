"""The two ways images are held here: uint8 [N,H,W,3], and float [N,3,H,W] in [0,1]."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.images import to_uint8


def as_uint8(images: Tensor) -> Tensor:
    """uint8 [N,H,W,3] from either. Raises: ValueError for another shape or type."""
    _check(images)
    return images if images.dtype == torch.uint8 else to_uint8(images)


def as_float(images: Tensor) -> Tensor:
    """float32 [N,3,H,W] in [0,1] from either; floats outside are clamped. Raises: ValueError as above."""
    _check(images)
    return images.permute(0, 3, 1, 2).float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)


def _check(images: Tensor) -> None:
    channels = 3 if images.dtype == torch.uint8 else 1
    held = images.dtype == torch.uint8 or images.is_floating_point()
    if images.ndim != 4 or images.shape[channels] != 3 or not held:
        raise ValueError(f"images are uint8 [N,H,W,3] or float [N,3,H,W], got {images.dtype} {tuple(images.shape)}")
