"""Frozen weights in 8 bits: half of bf16, for a base that LoRA stacks learn on, and for generation on small cards.

The matrices of the transformer's blocks are kept as e4m3 with a scale for each row, and widened for each product;
what embeds time, caption and patches, modulates, and the final layer stay as they are. Libraries that do this swap a
weight's contents around its forward, which a backward pass does not survive; here the product has a backward of its
own, which widens again.

To generate on GPUs that multiply in 8 bits, products are taken there instead: each token is brought to e4m3 with a
scale of its own, found on the spot. A distillation widens: it lives on small differences between scores.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from fewstep.core.precision import autocasts
from fewstep.models.adapters import TARGETS

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


class _Product(torch.autograd.Function):
    """``x @ (scale * weight).T`` for a frozen weight; the widened weight is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ weight.to(gradient.dtype), None, None


def quantize_rowwise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, D] as e4m3 [N, D], and their scales [N, 1] in fp32; each row's largest number becomes e4m3's."""
    wide = rows.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).to(FP8), scale


def fp8_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x @ (scale * weight).T`` in 8 bits: x [..., in], weight [out, in] in e4m3, scale [out] -> bf16 [..., out]."""
    narrowed, of_rows = quantize_rowwise(x.flatten(0, -2))
    each_row = ScalingType.RowWise
    y = F.scaled_mm(narrowed, weight.t(), of_rows, each_row, scale[None], each_row, output_dtype=torch.bfloat16)
    return y.unflatten(0, x.shape[:-1])


def supports_fp8_matmul(device: torch.device | str) -> bool:
    """Whether products in 8 bits are faster there: GPUs since Ada and Hopper. A CPU can, but slowly."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Linear(nn.Linear):
    """A frozen linear layer; its rows are ``scale * weight``, ``weight`` [out, in] in e4m3 and ``scale`` [out].

    Args:
        products: whether they are taken in 8 bits too. No gradient passes then.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, products: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = quantize_rowwise(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.squeeze(1))
        self.bias = linear.bias
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        if autocasts(x.device):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = fp8_matmul if self.products else _Product.apply
        y = product(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_fp8(module: nn.Module) -> bool:
    """Whether any of its weights are in 8 bits."""
    return any(isinstance(part, Fp8Linear) for part in module.modules())


def quantizable_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """What is narrowed, by name; with LoRA stacks on it, it is their base layer."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if type(module) is nn.Linear and name.removesuffix(".base_layer").endswith(TARGETS)
    }


def quantize_fp8_(transformer: ZImageTransformer2DModel, products: bool = False) -> ZImageTransformer2DModel:
    """Puts the matrices of the transformer's blocks into 8 bits, in place; LoRA stacks on them stay.

    Args:
        products: whether these are taken in 8 bits too; not for training.
    """
    for name, linear in quantizable_linears(transformer).items():
        owner, _, last = name.rpartition(".")
        transformer.get_submodule(owner).register_module(last, Fp8Linear(linear, products))
    return transformer
