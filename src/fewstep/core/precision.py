"""The precision that a computation uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether losses run under bf16 autocast; for "auto", whether the device has native bf16 matrix products.

    On CPUs with AVX512-BF16 or AMX bf16 makes a training step nearly twice as fast, on other CPUs slower. fp16 is not
    offered: activations of Z-Image overflow in it.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, operations compute in the dtype of their inputs."""
    if not autocasts(device):
        return nullcontext()
    disabled: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return disabled
