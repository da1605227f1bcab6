"""What is measured in every image: sharpness, grain, and a perceptual hash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

HASH_BITS = 64
_MEASURED_EDGE = 512  # pixels: sharpness and grain of pictures of all sizes are compared there
_HASH_EDGE = 32
_CHUNK = 1024

Gray = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def gray_at(image: Image.Image, edge: int) -> Gray:
    """Luminance in [0, 255] with ``edge`` as the longest edge; smaller images are not enlarged."""
    scale = min(1.0, edge / max(image.size))
    size = max(3, round(image.width * scale)), max(3, round(image.height * scale))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=np.float64)


def sharpness(image: Image.Image) -> float:
    """The variance of the Laplacian of the luminance at 512 pixels (Pech-Pacheco et al., 2000): low is blurred."""
    gray = gray_at(image, _MEASURED_EDGE)
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * gray[1:-1, 1:-1]
    return float(laplacian.var())


def grain(image: Image.Image) -> float:
    """The standard deviation of noise in levels of 255 (Immerkaer, 1996: the response to the difference of two
    Laplacians), of the middle 512 pixels at full size, in the smoothest quarter of its tiles."""
    width, height = min(image.width, _MEASURED_EDGE), min(image.height, _MEASURED_EDGE)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    gray = np.asarray(image.crop((left, top, left + width, top + height)).convert("L"), dtype=np.float64)
    if min(gray.shape) < 3:
        return 0.0
    rows = gray[:-2] - 2 * gray[1:-1] + gray[2:]
    response = np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:])
    tiles = [
        float(response[y : y + 32, x : x + 32].mean())
        for y in range(0, response.shape[0], 32)
        for x in range(0, response.shape[1], 32)
    ]
    smoothest = sorted(tiles)[: max(1, len(tiles) // 4)]
    return float(np.sqrt(np.pi / 2) / 6 * np.mean(smoothest))


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: whether each of the lowest 8 x 8 frequencies of the luminance at 32 x 32 is above their median (pHash,
    Zauner 2010). Copies of other sizes and qualities differ in few bits, other images in about 32."""
    gray = np.asarray(image.convert("L").resize((_HASH_EDGE, _HASH_EDGE), Image.Resampling.BOX), dtype=np.float64)
    low = _cosines() @ gray @ _cosines().T
    bits = (low > np.median(low.flatten()[1:])).flatten()
    return int(sum(1 << index for index, bit in enumerate(bits) if bit))


def near_duplicates(hashes: Sequence[int], distance: int) -> list[list[int]]:
    """Groups of two or more images whose hashes are linked by at most ``distance`` different bits, by their numbers.

    All pairs are compared, a thousand rows at a time: of 10,000 images that takes some seconds and 80 MB.
    """
    codes = np.array(hashes, dtype=np.uint64)
    parent = list(range(len(codes)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start in range(0, len(codes), _CHUNK):
        apart = np.bitwise_count(codes[start : start + _CHUNK, None] ^ codes[None, start:])
        for row, column in zip(*np.nonzero(apart <= distance), strict=True):
            if column > row:
                parent[root(start + int(column))] = root(start + int(row))
    groups: dict[int, list[int]] = {}
    for index in range(len(codes)):
        groups.setdefault(root(index), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _cosines() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The first 8 rows of the discrete cosine transform of 32 values."""
    rows, columns = np.arange(8)[:, None], np.arange(_HASH_EDGE)[None]
    return np.cos(np.pi * rows * (2 * columns + 1) / (2 * _HASH_EDGE))
