"""Sizes that images are cropped to, so that those of one batch are alike."""

from __future__ import annotations

import math
from typing import Literal

from PIL import Image

Fit = Literal["buckets", "square", "longest-edge"]

#: Width over height of the buckets.
RATIOS = (1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0)
MULTIPLE = 32  # of all sides in pixels: a whole number of patches of latents, also of half-size images


def target_size(width: int, height: int, side: int, fit: Fit) -> tuple[int, int]:
    """The size in pixels that an image is scaled to and cropped to, never enlarged.

    Args:
        side: of a square bucket; the others have about its area. With "longest-edge", the longest edge.
        fit: "buckets": the nearest of ``RATIOS``; "square": a square; "longest-edge": the image's own ratio.

    Returns:
        (width, height), multiples of ``MULTIPLE``, or the image's own where it is smaller than that.
    """
    if fit == "longest-edge":
        scale = min(1.0, side / max(width, height))
        return _down(width * scale), _down(height * scale)
    ratio = 1.0 if fit == "square" else min(RATIOS, key=lambda one: abs(math.log(one * height / width)))
    wanted = side * math.sqrt(ratio), side / math.sqrt(ratio)
    scale = min(1.0, width / wanted[0], height / wanted[1])
    if scale == 1.0:
        nearest = [max(MULTIPLE, round(edge / MULTIPLE) * MULTIPLE) for edge in wanted]
        if nearest[0] <= width and nearest[1] <= height:
            return nearest[0], nearest[1]
    return _down(wanted[0] * scale), _down(wanted[1] * scale)


def crop_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of an image that is scaled to cover ``size``."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _down(edge: float) -> int:
    whole = int(edge + 1e-6)
    return whole // MULTIPLE * MULTIPLE if whole >= MULTIPLE else max(whole, 1)
