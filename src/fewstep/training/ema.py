"""Exponential moving average of a module's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """Exponential moving average of the trainable parameters of `module`, warmed up: by the decay
    min(decay, (1 + updates) / (10 + updates)).

    The warm-up lets the average forget the initial weights in short runs (as TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Moves towards the live weights; `updates` counts their earlier updates, from 0."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.weights.values()), list(self._live.values()), 1 - decay)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            if isinstance(parameter, DTensor):  # FSDP all-gathers from the storage it registered
                live = parameter.detach().clone()
                parameter.copy_(self.weights[name])
                self.weights[name].copy_(live)
            else:
                parameter.data, self.weights[name] = self.weights[name], parameter.data
