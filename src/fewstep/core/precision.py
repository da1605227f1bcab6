"""Which arithmetic a computation uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether losses run under bf16 autocast; "auto" asks whether the device has bf16 matrix products of its own.

    On CPUs with AVX512-BF16 or AMX they make a training step nearly twice as fast, on others slower. fp16 is no choice:
    it overflows in this family of models.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, operations compute in the precision of what they are given."""
    if not autocasts(device):
        return nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return off
