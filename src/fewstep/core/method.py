"""What the trainer asks of an algorithm: its trainables, and nothing about optimizers, devices or files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Whatever the data function returns and the losses take; the trainer never looks inside.
Batch = Any
Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Trainable:
    """One network that learns.

    name: names its optimizer, its EMA and its part of a checkpoint; unique within a method.
    module: the parameters with `requires_grad` are those it moves.
    loss: batch -> (scalar loss, metrics of scalar tensors). Its gradient must reach this module alone.
    updates_per_step: how many times it moves in one step, each time on a new batch; at least 1.
    start_step: how many steps the others take before it starts.
    """

    name: str
    module: nn.Module
    loss: Loss
    updates_per_step: int = 1
    start_step: int = 0


class Method:
    """An algorithm: in every step its trainables move in turn, between `before_step` and `after_step`.

    A method may keep no state of its own between steps other than its trainables' modules: nothing else is saved.
    All its randomness comes from torch's global generators, whose state is saved.
    """

    trainables: list[Trainable]

    def before_step(self, step: int) -> None:
        """Called before step number `step`; the first is 1, or the first after what a checkpoint holds."""

    def after_step(self, step: int) -> dict[str, float]:
        """Called after step number `step`; returns further metrics, often none."""
        return {}
