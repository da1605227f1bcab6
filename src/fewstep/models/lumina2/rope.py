"""Lumina 2's three-axis rotary position embedding."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def rope_freqs(
    axes: tuple[int, ...], theta: float, lengths: tuple[int, ...], rows: int, columns: int, device: torch.device
) -> Tensor:
    """Every token's rotations as complex numbers, [B, L, head_dim / 2]: image tokens, then caption tokens.

    Caption token i has position (i, 0, 0), the patch at row r and column c (caption, r, c).

    Args:
        axes: dimensions of a head that each position axis rotates.
        lengths: of the captions, in tokens.
        rows, columns: of patches.
    """
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(len(lengths), -1, -1)
    captions = torch.tensor(lengths)[:, None, None].expand(-1, grid.shape[1], 1)
    text = torch.nn.functional.pad(torch.arange(max(lengths))[:, None], (0, 2)).expand(len(lengths), -1, -1)
    positions = torch.cat([torch.cat([captions, grid], dim=-1), text], dim=1).double()
    angles = []
    for axis, dim in enumerate(axes):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[..., axis, None] * frequency)
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).to(device)
