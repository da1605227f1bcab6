"""What the trainer knows of an algorithm: its trainable parts and its state, no optimizer, device, file or process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from fewstep.errors import UserError

#: Whatever the batch source returns and the losses take; the trainer does not look inside.
Batch = Any
Loss = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


#: Metrics that the trainer logs of every trainable part, as ``<part>/<name>``, besides those of its loss.
UPDATE_METRICS = ("loss", "grad_norm", "lr", "nonfinite_skips")


@dataclass(frozen=True)
class Shard:
    """One process's part of every batch."""

    rank: int = 0
    world_size: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that this process reads and computes.

        Raises:
            UserError: the batch cannot be divided.
        """
        if batch_size % self.world_size:
            raise UserError(f"train.batch_size {batch_size} is not a multiple of the {self.world_size} processes")
        count = batch_size // self.world_size
        return slice(self.rank * count, (self.rank + 1) * count)


class BatchSource(Protocol):
    """``source(position, shard) -> batch``: this process's rows of batch number ``position``.

    A pure function, unless it is a :class:`StreamSource`: the position in the data is then one integer, and any number
    of processes sees the same batches.
    """

    def __call__(self, position: int, shard: Shard) -> Batch: ...


class StreamSource(ABC):
    """A batch source that reads a stream: its batches come in the order of their positions alone, and each process has
    a state of its own, which is saved in checkpoints."""

    @abstractmethod
    def __call__(self, position: int, shard: Shard) -> Batch:
        """This process's rows of the next batch. Raises: ValueError if ``position`` is not its number."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """JSON values from which the next batches follow."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


@dataclass
class Trainable:
    """One trainable part of a method.

    Attributes:
        name: names its optimizer, its EMA and its part of a checkpoint; unique within a method.
        module: its parameters with ``requires_grad`` are trained.
        loss: batch -> (scalar loss, metrics of scalar tensors). Its gradient must reach this module alone.
        updates_per_step: optimizer updates in one step, each on a new batch, unless ``uses_collected``.
        start_step: steps that the others take before it starts.
        uses_collected: its losses take what ``Method.collect`` made of one batch, once a step.
        loss_meaning: what the displayed loss says, in words for someone who sees it for the first time.
    """

    name: str
    module: nn.Module
    loss: Loss
    updates_per_step: int = 1
    start_step: int = 0
    uses_collected: bool = False
    loss_meaning: str = ""


class Method:
    """An algorithm: in every step its trainables are updated in order, between ``before_step`` and ``after_step``.

    All its randomness comes from torch's global generators, whose state is saved in checkpoints.
    """

    trainables: list[Trainable]

    def before_step(self, step: int) -> None:
        """Called before each step; ``step`` counts finished steps, from 0."""

    def collect(self, batch: Batch) -> Any:
        """Samples that several trainables, or several updates of one, share within a step.

        Called once a step and batch if a trainable has ``uses_collected``; what it returns is passed to their losses.
        Rollouts, groups, rewards and log-probabilities are computed here, without gradient.
        """
        return batch

    def after_step(self, step: int) -> dict[str, float]:
        """Called after each step; returns further metrics."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """State besides the trainables' weights, for checkpoints; the same on every process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave."""
