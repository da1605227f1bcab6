"""Frozen weights in 8 bits: half of bf16, for a base that LoRA stacks learn on, and for generation on small cards.

The matrices of the transformer's blocks are kept as e4m3 with a scale for each row, and widened for each product;
what embeds time, caption and patches, modulates, and the final layer stay as they are. Libraries that do this swap a
weight's contents around its forward, which a backward pass does not survive; here the product has a backward of its
own, which widens again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

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


class Fp8Linear(nn.Linear):
    """A frozen linear layer; its rows are ``scale * weight``, ``weight`` [out, in] in e4m3 and ``scale`` [out]."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        whole = linear.weight.detach().float()
        scale = (whole.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        self.weight = nn.Parameter((whole / scale[:, None]).to(FP8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y: Tensor = _Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_narrow(module: nn.Module) -> bool:
    """Whether any of its weights are in 8 bits."""
    return any(isinstance(part, Fp8Linear) for part in module.modules())


def matrices(transformer: nn.Module) -> dict[str, nn.Linear]:
    """What is narrowed, by name; with LoRA stacks on it, it is their base layer."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if type(module) is nn.Linear and name.removesuffix(".base_layer").endswith(TARGETS)
    }


def narrow(transformer: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    """Puts the matrices of the transformer's blocks into 8 bits, in place; LoRA stacks on them stay."""
    for name, linear in matrices(transformer).items():
        owner, _, last = name.rpartition(".")
        transformer.get_submodule(owner).register_module(last, Fp8Linear(linear))
    return transformer
