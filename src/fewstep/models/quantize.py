"""Weights in fp8: half of bf16's memory, for a frozen base that LoRA adapters train on, and for inference.

The transformer blocks' weight matrices are stored as e4m3 with a scale for each row and dequantized for each product;
embeddings, modulation and the final layer keep their dtype. Libraries that swap a weight's data around its forward pass
break the backward pass; here the product has its own backward, which dequantizes again.

For inference on GPUs with fp8 matrix products, activations are quantized dynamically too, with a scale for each token.
Distillation dequantizes instead: it depends on small differences between scores.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from fewstep.core.precision import autocasts, fp8_cost
from fewstep.models.linear_layers import matching_linears

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


class _DequantizedMatmul(torch.autograd.Function):
    """``x @ (scale * weight).T`` for a frozen weight; the dequantized weight is not saved for the backward pass."""

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
    """Rows [N, D] as e4m3 [N, D] and scales [N, 1] in fp32, which map each row's largest absolute value to e4m3's."""
    wide = rows.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).to(FP8), scale


def fp8_matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x @ (scale * weight).T`` as an fp8 product: x [..., in], weight [out, in] in e4m3, scale [out] -> bf16
    [..., out]."""
    quantized, token_scale = quantize_rowwise(x.flatten(0, -2))
    rowwise = ScalingType.RowWise
    y = F.scaled_mm(quantized, weight.t(), token_scale, rowwise, scale[None], rowwise, output_dtype=torch.bfloat16)
    return y.unflatten(0, x.shape[:-1])


def supports_fp8_matmul(device: torch.device | str) -> bool:
    """Whether the device has fast fp8 matrix products: GPUs since Ada and Hopper. A CPU has slow ones."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def warn_without_fp8_matmul(device: torch.device) -> None:
    """Warn where fp8 saves memory but no time, with the cost that is measured here."""
    if not supports_fp8_matmul(device):
        warnings.warn(
            f"weights in fp8: this {device.type} has no fast fp8 products, converting weights makes a product take "
            f"{fp8_cost(device):.2g} times as long as in bf16; use dtype bf16 where memory suffices",
            stacklevel=3,
        )


class Fp8Linear(nn.Linear):
    """A frozen linear layer with rows ``scale * weight``, ``weight`` [out, in] in e4m3 and ``scale`` [out].

    Args:
        dynamic_activation_quant: whether inputs are quantized too, for fp8 products. No gradient passes then.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear, dynamic_activation_quant: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = quantize_rowwise(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.squeeze(1))
        self.bias = linear.bias
        self.dynamic_activation_quant = dynamic_activation_quant

    def forward(self, x: Tensor) -> Tensor:
        if autocasts(x.device):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        matmul = fp8_matmul if self.dynamic_activation_quant else _DequantizedMatmul.apply
        y = matmul(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_fp8(module: nn.Module) -> bool:
    """Whether any of its weights are in fp8."""
    return any(isinstance(part, Fp8Linear) for part in module.modules())


def quantize_fp8_(transformer: nn.Module, endings: Sequence[str], dynamic_activation_quant: bool = False) -> None:
    """Quantize the linear layers whose names have one of the endings to fp8, in place; LoRA adapters on them stay.

    Args:
        endings: a family's ``quantizable_modules``.
        dynamic_activation_quant: whether inputs are quantized too; not for training.

    Raises:
        UserError: an ending matches no linear layer.
    """
    for name, linear in matching_linears(transformer, endings, "quantizable_modules").items():
        if isinstance(linear, Fp8Linear):
            continue
        owner, _, last = name.rpartition(".")
        transformer.get_submodule(owner).register_module(last, Fp8Linear(linear, dynamic_activation_quant))
