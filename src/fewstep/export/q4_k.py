"""GGUF's 4-bit format Q4_K, which the ``gguf`` package reads but does not write.

256 numbers of a row share a block of 144 bytes: two fp16 factors d and m, eight 6-bit scales and minima (one pair for
each 32 numbers), and 256 4-bit numbers q. A number is ``d scale q - m minimum``; see ``block_q4_K`` in ggml.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, BLOCK_BYTES = 256, 144
_GROUPS, _GROUP = 8, 32  # of a block: its groups, and the numbers of one
_LEVELS, _SIX_BITS = 15, 63
_CANDIDATES = [_LEVELS + offset for offset in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)]
_CHUNK = 2**13  # blocks at a time: temporary tensors of tens of megabytes, whatever the matrix


def quantize_q4_k(rows: Tensor) -> Tensor:
    """Rows [N, D], D a multiple of 256 -> bytes [N, D / 256 * 144] in uint8.

    Each group of 32 tries several scales; after each rounding, scale and minimum are those of least squares, weighted
    towards large numbers. ggml's search differs in detail, so that files are not equal to its own to the bit.
    """
    count = rows.shape[1] // BLOCK
    blocks = rows.reshape(-1, _GROUPS, _GROUP)
    packed = torch.cat([_quantize_blocks(chunk.float()) for chunk in blocks.split(_CHUNK)])
    return packed.reshape(len(rows), count * BLOCK_BYTES)


def _quantize_blocks(x: Tensor) -> Tensor:
    """[B, 8, 32] -> bytes [B, 144]."""
    scale, minimum = _fit_groups(x)
    factor, six_scale = _six_bits(scale)
    floor, six_minimum = _six_bits(minimum)
    step = factor.float()[:, None] * six_scale
    start = floor.float()[:, None] * six_minimum
    q = _round_levels(x, step[..., None], start[..., None]).to(torch.uint8)
    halves = [value[:, None].view(torch.uint8) for value in (factor, floor)]
    pairs = q.reshape(-1, _GROUPS // 2, 2, _GROUP)  # two groups share their bytes: low halves, then high halves
    numbers = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return torch.cat([*halves, _pack_six_bits(six_scale, six_minimum), numbers.flatten(1)], dim=1)


def _fit_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and minimum (at least 0 each) of every group [B, 8] with the least weighted squared error."""
    weight = x.abs() + x.square().mean(dim=-1, keepdim=True).sqrt()
    low, high = x.amin(dim=-1, keepdim=True).clamp(max=0), x.amax(dim=-1, keepdim=True)
    spread = (high - low).clamp(min=0)
    best, best_low = spread / _LEVELS, low
    least = _weighted_error(x, weight, best, -best_low)
    total, mean_x = weight.sum(dim=-1, keepdim=True), (weight * x).sum(dim=-1, keepdim=True)
    for candidate in _CANDIDATES:
        q = _round_levels(x, spread / candidate, -low)
        first, second = (weight * q).sum(dim=-1, keepdim=True), (weight * q * q).sum(dim=-1, keepdim=True)
        product = (weight * q * x).sum(dim=-1, keepdim=True)
        determinant = total * second - first * first
        scale = (total * product - mean_x * first) / determinant
        found_low = (second * mean_x - first * product) / determinant
        positive = found_low > 0  # a minimum is stored without a sign: then only the scale is fitted
        scale = torch.where(positive, product / second, scale)
        found_low = torch.where(positive, 0, found_low)
        error = _weighted_error(x, weight, scale, -found_low)
        better = (error < least) & (determinant > 0) & (scale > 0)
        best, best_low = torch.where(better, scale, best), torch.where(better, found_low, best_low)
        least = torch.where(better, error, least)
    return best.squeeze(-1), -best_low.squeeze(-1)


def _weighted_error(x: Tensor, weight: Tensor, step: Tensor, start: Tensor) -> Tensor:
    q = _round_levels(x, step, start)
    return (weight * (step * q - start - x).square()).sum(dim=-1, keepdim=True)


def _round_levels(x: Tensor, step: Tensor, start: Tensor) -> Tensor:
    """The nearest of the 16 levels ``step q - start``: q in [0, 15]."""
    safe = torch.where(step > 0, step, 1)
    return torch.where(step > 0, ((x + start) / safe).round().clamp(0, _LEVELS), 0)


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Eight numbers of each block [B, 8], at least 0 -> one fp16 factor [B], and numbers [B, 8] in [0, 63]."""
    factor = (values.amax(dim=1) / _SIX_BITS).half()
    wide = factor.float()[:, None]
    return factor, torch.where(wide > 0, (values / wide.clamp(min=1e-12)).round().clamp(0, _SIX_BITS), 0)


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Numbers [B, 8] in [0, 63] each -> bytes [B, 12]: the first four scales and minima whole; of the others the lower
    four bits of a pair in one byte, the upper two above the first four's six."""
    (first, last), (first_low, last_low) = (part.to(torch.uint8).chunk(2, dim=1) for part in (scales, minima))
    upper = first | (last >> 4) << 6
    upper_low = first_low | (last_low >> 4) << 6
    return torch.cat([upper, upper_low, last & 15 | (last_low & 15) << 4], dim=1)
