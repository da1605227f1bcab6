"""How much memory a computation takes at its worst moment, found without computing it.

On torch's meta device tensors have shapes and no contents, and the code that runs there is the real one: its tensors
are counted while they live. What a GPU does otherwise than the meta device (fused kernels, autocast) is put in their
place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of what is made inside as long as it is alive.

    Attributes:
        bytes: now.
        most: at the worst moment since the last :meth:`mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._held: dict[int, int] = {}

    def mark(self) -> None:
        self.most = self.bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                place = storage._cdata
                if place not in self._held and place not in given:
                    self._held[place] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.most = max(self.most, self.bytes)
                    weakref.finalize(storage, self._gone, place)
        return out

    def _gone(self, place: int) -> None:
        self.bytes -= self._held.pop(place)


class EmulatedDevice(TorchFunctionMode):
    """Operations on the meta device as they are on another: with its fused kernels and, in bf16, its autocast.

    Args:
        kind: "cuda", or "cpu", by which a test can hold this to real memory.
        bf16: under autocast.

    Attributes:
        copies: bf16 copies of weights that learn, each with its weight: autocast keeps them until its region ends.
    """

    def __init__(self, kind: Literal["cuda", "cpu"], bf16: bool) -> None:
        super().__init__()
        self.kind, self.bf16 = kind, bf16
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._regions = 0

    @contextmanager
    def region(self) -> Iterator[None]:
        """Inside, operations are as there; copies go when the outermost region ends."""
        self._regions += 1
        try:
            with self:
                yield
        finally:
            self._regions -= 1
            if not self._regions:
                self.copies.clear()

    @property
    def bytes(self) -> int:
        return sum(copy.nbytes for _, copy in self.copies.values())

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if self.bf16 and func in _IN_BF16:
            args = [self._cast(arg) for arg in args]
            given = {name: self._cast(value) for name, value in given.items()}
        if self.bf16 and func is F.layer_norm:
            args = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        if func is F.scaled_dot_product_attention:
            return _ATTENTION[self.kind](*args[:3] or (given["query"], given["key"], given["value"]))[0]
        if func is F.rms_norm and self.kind == "cuda":
            return _FusedNorm.apply(args[0], given["weight"])
        return func(*args, **given)

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
    """The shapes of CUDA's RMS norm: it keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
