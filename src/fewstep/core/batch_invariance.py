"""Results that do not depend on the batch, to the last bit, on CPUs.

A matrix product of all rows of a batch at once is faster, but its kernel, and so the order of its sums, depends on the
number of rows: an image drawn in a batch of 8 differs in its last bits from the same image drawn alone. Here each
sample has a product of its own; what else a transformer computes is independent between samples as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def batch_invariant(device: torch.device) -> AbstractContextManager[object]:
    """Inside, linear layers compute each sample of a batch as if it were alone. On a GPU it does nothing: a product for
    each sample would lose what batches are for there, and images agree to 1e-5 only."""
    return _LinearBySample() if device.type == "cpu" else nullcontext()


class _LinearBySample(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_linear_by_sample if func is F.linear else func)(*args, **(kwargs or {}))


def _linear_by_sample(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [B, ..., K], weight [N, K], bias [N] -> [B, ..., N]."""
    if len(x) == 1:
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return torch.cat([F.linear(sample, weight, bias) for sample in x.split(1)])
    # One call for all samples, whose products are still separate: for a small model, launching them one by one would
    # take a third of the time.
    samples, shared = x.reshape(len(x), -1, x.shape[-1]), weight.mT.expand(len(x), -1, -1)
    product = torch.bmm(samples, shared) if bias is None else torch.baddbmm(bias, samples, shared)
    return product.reshape(*x.shape[:-1], -1)
