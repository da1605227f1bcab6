"""Image files in batches of one size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.data.images import read_image

BATCH_SIZE = 32  # images


class PromptedImage(NamedTuple):
    """An image file, relative to a folder, and its prompt."""

    prompt: str
    image: str


def image_batches(folder: Path, wanted: Sequence[PromptedImage]) -> Iterator[tuple[list[PromptedImage], Tensor]]:
    """The images, float [B, 3, H, W] in [0, 1], those of one size together; all are read before the first batch.

    Raises:
        UserError: an image cannot be read.
    """
    by_size: dict[torch.Size, list[tuple[PromptedImage, Tensor]]] = defaultdict(list)
    for one in wanted:
        image = read_image(folder / one.image)
        by_size[image.shape].append((one, image))
    for group in by_size.values():
        for start in range(0, len(group), BATCH_SIZE):
            part = group[start : start + BATCH_SIZE]
            yield [one for one, _ in part], torch.stack([image for _, image in part]).permute(0, 3, 1, 2).float() / 255
