"""Real images of the emoji world as latents, rendered and encoded once before a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.emoji.dataset import EmojiDataset, EmojiSpec
from fewstep.progress import track


@dataclass
class LatentBank:
    """``variants`` differently placed images of each drawing, as normalised latents.

    Attributes:
        latents: fp16 [N, variants, C, H, W].
        row: (thing, style, color) -> row of ``latents``.
    """

    latents: Tensor
    row: dict[tuple[int, str, str], int]

    def draw(self, concepts: list[EmojiSpec], generator: torch.Generator) -> Tensor:
        """One image of each concept, at random: fp32 [B, C, H, W]."""
        rows = torch.tensor([self.row[c.thing, c.style, c.color] for c in concepts])
        variants = torch.randint(self.latents.shape[1], (len(concepts),), generator=generator)
        return self.latents[rows, variants].float()


@torch.no_grad()
def build_bank(
    world: EmojiDataset, concepts: list[EmojiSpec], encode: Callable[[Tensor], Tensor], variants: int, seed: int
) -> LatentBank:
    """Render and encode ``variants`` images of every drawing that ``concepts`` speak of, whatever the language.

    Args:
        encode: images [B, 3, 64, 64] in [0, 1] -> latents [B, C, H, W].
    """
    drawings = list(dict.fromkeys((c.thing, c.style, c.color) for c in concepts))
    row = {drawing: index for index, drawing in enumerate(drawings)}
    wanted = [EmojiSpec(*drawing, language="en") for drawing in drawings for _ in range(variants)]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in track(range(0, len(wanted), 256), "encoding images"):
        parts.append(encode(world.render(wanted[start : start + 256], generator)).half())
    latents = torch.cat(parts)
    return LatentBank(latents.unflatten(0, (len(drawings), variants)), row)
