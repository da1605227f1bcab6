"""Z-Image's three-axis rotary position embedding, and the padding that its positions account for."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor


def pad_to_multiple(length: int) -> int:
    """The next multiple of 32: image and caption tokens are each padded to one with learned pad tokens, which are
    attended to."""
    return -(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF


@lru_cache(maxsize=64)
def rope_freqs(
    axes: tuple[int, ...], theta: float, caption: int, rows: int, columns: int, device: torch.device
) -> Tensor:
    """Cosines and sines of every token's rotation angles, [L, 1, 2, head_dim / 2]: image tokens, then caption tokens.

    Caption token i has position (1 + i, 0, 0), the patch at row r and column c (caption + 1, r, c), image padding
    (0, 0, 0).

    Args:
        axes: dimensions of a head that each position axis rotates.
        caption: padded caption length in tokens.
        rows, columns: of patches.
    """
    grid = torch.cartesian_prod(torch.tensor([caption + 1]), torch.arange(rows), torch.arange(columns))
    image = F.pad(grid, (0, 0, 0, pad_to_multiple(len(grid)) - len(grid)))
    text = F.pad(torch.arange(1, caption + 1)[:, None], (0, 2))
    positions = torch.cat([image, text]).double()
    angles = []
    for axis, dim in enumerate(axes):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append((positions[:, axis, None] * frequency).float())
    angle = torch.cat(angles, dim=-1)[:, None, :]
    return torch.stack([angle.cos(), angle.sin()], dim=-2).to(device)


def apply_rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotate adjacent pairs of [B, L, heads, head_dim], in fp32."""
    # Real arithmetic: complex products are slower, and torch.compile does not fuse them.
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = freqs.unbind(-2)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2).type_as(x)
