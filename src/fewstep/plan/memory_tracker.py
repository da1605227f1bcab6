"""The peak memory of a computation, found without computing it.

Tensors on torch's meta device have shapes and no contents. The real code runs on it, and the bytes of live tensors are
counted. Fused kernels and autocast, which the meta device lacks, are emulated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fewstep.core.precision import emulated_autocast_is_off

DeviceType = Literal["cuda", "cpu"]

#: Any function of tensors.
Compute = Callable[..., Tensor]


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live tensors that were created in its context.

    Attributes:
        bytes: at present.
        peak: maximum since the last :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._live: dict[int, int] = {}

    def reset_peak(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live and key not in inputs:
                    self._live[key] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.bytes -= self._live.pop(key)


class EmulatedDevice(TorchFunctionMode):
    """Gives operations on the meta device the memory use of another: its fused kernels and, in bf16, its autocast.

    Args:
        device_type: "cuda", or "cpu", which tests compare with real memory.
        bf16: whether autocast is on.

    Attributes:
        copies: bf16 copies of trainable weights, each with its weight; autocast caches them until its context ends.
    """

    def __init__(self, device_type: DeviceType, bf16: bool) -> None:
        super().__init__()
        self.device_type, self.bf16 = device_type, bf16
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._depth = 0

    @contextmanager
    def autocast_region(self) -> Iterator[None]:
        """The context of emulation; the outermost one frees the bf16 copies at its end."""
        self._depth += 1
        try:
            with self:
                yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.copies.clear()

    @property
    def copy_bytes(self) -> int:
        """Bytes of the bf16 copies."""
        return sum(copy.nbytes for _, copy in self.copies.values())

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        bf16 = self.bf16 and not emulated_autocast_is_off()
        if func is torch.autograd.grad:
            with self:  # for what the backward pass computes again; the function itself would be dispatched here again
                outputs, inputs = args[:2]  # tuples here
                ones = tuple(torch.ones_like(each) for each in outputs)
                return _engine_run_backward(outputs, ones, False, False, inputs, False, accumulate_grad=False)
        if bf16 and func in _IN_BF16:
            args = [self._cast(arg) for arg in args]
            named = {name: self._cast(value) for name, value in named.items()}
        if bf16 and func is F.layer_norm:
            args = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        if func is F.scaled_dot_product_attention:
            return _ATTENTION[self.device_type](*args[:3] or (named["query"], named["key"], named["value"]))[0]
        if func is F.rms_norm and self.device_type == "cuda":
            return _FusedNorm.apply(args[0], named["weight"])
        return func(*args, **named)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.bfloat16()
        if id(value) not in self.copies:
            self.copies[id(value)] = value, value.bfloat16()
        return self.copies[id(value)][1]


_IN_BF16 = {F.linear, F.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, F.conv2d}

_ATTENTION: dict[str, Callable[..., Any]] = {
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
}


class _FusedNorm(torch.autograd.Function):
    """The shapes of CUDA's RMS norm, which saves its input and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
