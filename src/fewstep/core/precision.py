"""The precision that a computation uses, and what the device does natively."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch
from torch import nn

_PROBE = 384  # side of the matrices whose product is timed

#: Names in ``torch.cpu.get_capabilities`` of instructions for bf16 products: x86, then ARM.
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix products in hardware.

    On CPUs with such instructions bf16 makes a training step nearly twice as fast, on other CPUs many times slower.
    fp16 is not offered: activations of Z-Image overflow in it.
    """
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in _CPU_BF16)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether losses run under bf16 autocast; for "auto", whether the device has native bf16 matrix products."""
    return has_native_bf16(device) if precision == "auto" else precision == "bf16"


def warn_if_emulated(setting: str, device: torch.device, instead: str) -> None:
    """Warn where bf16 is emulated, with the cost that is measured here.

    Args:
        setting: what asks for bf16, such as "train.precision bf16".
        instead: the setting to use.
    """
    if not has_native_bf16(device):
        warnings.warn(
            f"{setting}: this {device.type} has no bf16 instructions, a matrix product takes {bf16_cost(device):.2g} "
            f"times as long as in fp32; use {instead}",
            stacklevel=2,
        )


def warn_if_weights_are_emulated(module: nn.Module, device: torch.device) -> None:
    """:func:`warn_if_emulated` for a module with weights in bf16."""
    if any(weight.dtype == torch.bfloat16 for weight in module.parameters()):
        warn_if_emulated("weights in bf16", device, "dtype fp32 (in recipes models.frozen_dtype: fp32)")


@cache
def bf16_cost(device: torch.device) -> float:
    """The time of a bf16 matrix product over that of an fp32 one, measured in less than a second."""
    return _matmul_seconds(device, torch.bfloat16) / _matmul_seconds(device, torch.float32)


def _matmul_seconds(device: torch.device, dtype: torch.dtype, stored: torch.dtype | None = None) -> float:
    """The shorter of two runs after a first one; the right factor is converted from ``stored`` in each."""
    matrix = torch.ones(_PROBE, _PROBE, dtype=dtype, device=device)  # not random: a seeded training stays as it is
    other = matrix.to(stored or dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (matrix @ other.to(dtype))[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@cache
def fp8_cost(device: torch.device) -> float:
    """The time of a bf16 product with weights that are converted from fp8 over that of a bf16 product."""
    converted = _matmul_seconds(device, torch.bfloat16, torch.float8_e4m3fn)
    return converted / _matmul_seconds(device, torch.bfloat16)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


_emulated_off = ContextVar("emulated_autocast_is_off", default=False)


def emulated_autocast_is_off() -> bool:
    """Whether :func:`without_autocast` holds on the meta device, where ``fewstep plan`` emulates autocast."""
    return _emulated_off.get()


@contextmanager
def _without_emulated_autocast() -> Iterator[None]:
    token = _emulated_off.set(True)
    try:
        yield
    finally:
        _emulated_off.reset(token)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, operations compute in the dtype of their inputs."""
    if device.type == "meta":
        return _without_emulated_autocast()
    if not autocasts(device):
        return nullcontext()
    disabled: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return disabled
