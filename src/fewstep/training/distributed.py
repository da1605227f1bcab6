"""Several processes as one: started by torchrun, weights sharded by FSDP2, batches divided, random draws as of one.

A training on N processes takes the steps that one process would take with the same batches: each holds a part of every
batch, gradients are averaged, and noise is drawn for the whole batch before each keeps its own part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from fewstep.config.recipe import Recipe
from fewstep.errors import UserError
from fewstep.training.run_dir import RunDir

Value = TypeVar("Value")


@dataclass(frozen=True)
class DistContext:
    """Who this process is among `world`; the only one, unless torchrun says otherwise."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def shard(self, batch: Any) -> Any:
        """This process's rows of a batch: of each part, if it is a tuple.

        Raises:
            UserError: the batch cannot be divided.
        """
        if self.world_size == 1:
            return batch
        if isinstance(batch, tuple | list):
            return tuple(self.shard(part) for part in batch)
        if len(batch) % self.world_size:
            raise UserError(f"train.batch_size {len(batch)} is no multiple of the {self.world_size} processes")
        each = len(batch) // self.world_size
        return batch[self.rank * each : (self.rank + 1) * each]

    def global_rng(self) -> Any:
        """A context in which `torch.randn_like` and `rand_like` draw for all processes and give this one's rows."""
        return GlobalBatchRNG(self) if self.world_size > 1 else nullcontext()

    def all_reduce_mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes; all must have the same names."""
        if self.world_size == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world_size).tolist(), strict=True))

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def all_gather_object(self, value: Value) -> list[Value]:
        """Every process's value, in their order, on all of them."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def all_gather(self, rows: Tensor) -> Tensor:
        """All processes' rows of a batch, in order, with gradient: for losses that are no mean over samples."""
        if self.world_size == 1:
            return rows
        return torch.cat(all_gather(rows.contiguous()))

    def sync_unsharded_grads(self, weights: Iterable[Tensor]) -> None:
        """Averages over the processes what FSDP has not averaged: gradients of weights that each holds whole."""
        if self.world_size == 1:
            return
        for weight in weights:
            if weight.grad is not None and not isinstance(weight.grad, DTensor):
                dist.all_reduce(weight.grad)
                weight.grad /= self.world_size

    def broadcast(self, module: nn.Module) -> None:
        """Gives a module that every process holds whole the first one's weights."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process goes through alone, the others after it: they find what it has written."""
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()

    def barrier(self) -> None:
        """Until all are here."""
        if self.world_size > 1:
            dist.barrier()

    def mesh(self, group: int | None = None) -> DeviceMesh:
        """All processes in a row; or, with `group`, copies side by side, each sharded over so many (hybrid sharding).

        Raises:
            UserError: the processes cannot be divided so.
        """
        if group is None or group == self.world_size:
            return init_device_mesh(self.device.type, (self.world_size,))
        if self.world_size % group:
            raise UserError(f"train.fsdp_shard_size {group} does not divide the {self.world_size} processes")
        return init_device_mesh(
            self.device.type, (self.world_size // group, group), mesh_dim_names=("replicate", "shard")
        )


@contextmanager
def open_run(ranks: DistContext, directory: str | Path, recipe: Recipe, **options: Any) -> Iterator[RunDir]:
    """The run in a directory for several processes: the first claims it, the others follow."""
    with ranks.main_process_first():
        run = RunDir(directory, recipe, read_only=not ranks.is_main_process, **options)
    with run:
        yield run


class GlobalBatchRNG(TorchFunctionMode):
    """Draws of noise like a tensor, as one process would make them for the whole batch."""

    _draws: Mapping[Any, Callable[..., Tensor]] = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}

    def __init__(self, ranks: DistContext) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self._draws:
            return func(*args, **(kwargs or {}))
        distribute_like: Tensor = args[0]
        count = len(distribute_like)
        full_tensor = self._draws[func](
            count * self.ranks.world_size,
            *distribute_like.shape[1:],
            dtype=distribute_like.dtype,
            device=distribute_like.device,
        )
        return full_tensor[self.ranks.rank * count : (self.ranks.rank + 1) * count]


@contextmanager
def init_distributed() -> Iterator[DistContext]:
    """Joins the other processes if torchrun started this one; alone otherwise.

    Raises:
        UserError: there are more processes on a machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistContext(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU: there are {torch.cuda.device_count()}; start fewer")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield DistContext(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
