"""How many images are sampled and decoded together."""

from __future__ import annotations

MAX_BATCH_SIZE = 64  # images
MAX_PIXELS_PER_BATCH = 2**21  # in one forward of the transformer: two images of 1024 x 1024
MAX_DECODE_PIXELS = 2**20  # in one forward of the VAE's decoder, which needs far more memory a pixel


def max_batch_size(height: int, width: int, frames: int = 1) -> int:
    """Images of this size, in pixels, or videos of so many frames, that are sampled together by default."""
    return max(1, min(MAX_BATCH_SIZE, MAX_PIXELS_PER_BATCH // (height * width * frames)))


def max_decode_batch_size(height: int, width: int, frames: int = 1) -> int:
    """Images of this size, in pixels, or videos of so many frames, that are decoded together."""
    return max(1, MAX_DECODE_PIXELS // (height * width * frames))


def batched(count: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``range(count)`` in order."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
