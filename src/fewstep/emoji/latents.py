"""Real images of the emoji dataset as latents, rendered and encoded once before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.emoji.dataset import EmojiDataset, EmojiSpec
from fewstep.machine import reading
from fewstep.progress import track

ImageKey = tuple[int, str, str]  # (object, style, background)


def image_key(spec: EmojiSpec) -> ImageKey:
    """What determines a spec's image: all but the language."""
    return spec.object, spec.style, spec.background


@dataclass
class LatentBank:
    """K augmentations of each (object, style, background) as normalized latents.

    Attributes:
        latents: fp16 [N, K, C, H, W].
        row: (object, style, background) -> row of ``latents``.
    """

    latents: Tensor
    row: dict[ImageKey, int]

    def draw(self, specs: list[EmojiSpec], generator: torch.Generator) -> Tensor:
        """One random augmentation of each spec's image: fp32 [B, C, H, W]."""
        rows = torch.tensor([self.row[image_key(spec)] for spec in specs])
        augmentations = torch.randint(self.latents.shape[1], (len(specs),), generator=generator)
        return self.latents[rows, augmentations].float()


@torch.no_grad()
def build_bank(
    dataset: EmojiDataset,
    specs: list[EmojiSpec],
    encode: Callable[[Tensor], Tensor],
    augmentations: int,
    seed: int,
    file: Path | None = None,
    render: Callable[[list[EmojiSpec], torch.Generator], Tensor] | None = None,
) -> LatentBank:
    """Render and encode ``augmentations`` images of each distinct (object, style, background) of ``specs``.

    Args:
        encode: images [B, 3, 64, 64] in [0, 1] -> latents [B, C, H, W].
        file: keeps the latents; if it exists they are read from it, so that a resumed run need not encode again.
        render: specs -> images; real ones by default.
    """
    keys = list(dict.fromkeys(image_key(spec) for spec in specs))
    row = {key: index for index, key in enumerate(keys)}
    if file is not None and file.exists():
        with reading(file, "delete it, and resume"):
            return LatentBank(load_file(file)["latents"], row)
    repeated = [EmojiSpec(*key, language="en") for key in keys for _ in range(augmentations)]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in track(range(0, len(repeated), 256), "encoding images"):
        parts.append(encode((render or dataset.render)(repeated[start : start + 256], generator)).half())
    latents = torch.cat(parts).unflatten(0, (len(keys), augmentations))
    if file is not None:
        write_tensors(file, {"latents": latents})
    return LatentBank(latents, row)
