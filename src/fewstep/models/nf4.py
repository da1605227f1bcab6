"""Weights in NF4 (QLoRA, arXiv 2305.14314): 4.25 bits a weight, for a frozen base that LoRA adapters train on.

Blocks of 64 weights are divided by their largest absolute value, and each is rounded to the nearest of 16 levels, which
are quantiles of a normal distribution. The weights are dequantized for each product, and again in its backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.precision import autocasts
from fewstep.models.linear_layers import matching_linears

BLOCK = 64  # weights that share a scale

#: The levels, from the paper's appendix E.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of any shape as two levels a byte, uint8, and the scale of each block in bf16; the last block is filled
    up with zeros."""
    flat = weight.flatten().float()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax(dim=1, keepdim=True).to(torch.bfloat16)
    values = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(LEVELS, device=weight.device)
    number = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2, out_int32=True).flatten().to(torch.uint8)
    return number[::2] << 4 | number[1::2], scale.squeeze(1)


def dequantize_nf4(packed: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight of this shape, from :func:`quantize_nf4`."""
    numbers = torch.stack([packed >> 4, packed & 15], dim=-1).flatten().int()
    values = torch.tensor(LEVELS, device=packed.device, dtype=dtype)[numbers].unflatten(0, (-1, BLOCK))
    return (values * scale.to(dtype)[:, None]).flatten()[: math.prod(shape)].view(*shape)


class _DequantizedMatmul(torch.autograd.Function):
    """``x @ weight.T`` for a frozen weight [out, in]; the dequantized weight is not saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, out: int) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.shape = out, x.shape[-1]
        return F.linear(x, dequantize_nf4(packed, scale, ctx.shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        packed, scale = ctx.saved_tensors
        return gradient @ dequantize_nf4(packed, scale, ctx.shape, gradient.dtype), None, None, None


class Nf4Linear(nn.Linear):
    """A frozen linear layer: ``weight`` has its packed levels, ``scale`` those of its blocks."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = quantize_nf4(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if autocasts(x.device):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _DequantizedMatmul.apply(x, self.weight, self.scale, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_nf4_(transformer: nn.Module, endings: Sequence[str]) -> None:
    """Quantize the linear layers whose names have one of the endings to NF4, in place; LoRA adapters on them stay.

    Args:
        endings: a family's ``quantizable_modules``.

    Raises:
        UserError: an ending matches no linear layer.
    """
    for name, linear in matching_linears(transformer, endings, "quantizable_modules").items():
        owner, _, last = name.rpartition(".")
        transformer.get_submodule(owner).register_module(last, Nf4Linear(linear))
