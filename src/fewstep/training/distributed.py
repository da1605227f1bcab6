"""Distributed training: processes started by torchrun, weights sharded by FSDP2, batches and random draws divided.

A training on N processes takes the same steps as on one process with the same batches: each process computes its rows
of every batch, gradients are averaged, and noise is drawn for the whole batch before each process keeps its rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from fewstep.config.recipe import Recipe
from fewstep.core.device import AUTO, parse_device, resolve_device
from fewstep.core.global_rng import GlobalBatchRNG
from fewstep.core.method import Shard
from fewstep.errors import UserError
from fewstep.training.run_dir import RunDir

Value = TypeVar("Value")


@dataclass(frozen=True)
class DistContext:
    """The rank and device of this process among `world_size`; by default the only one.

    Attributes:
        context_parallel: processes in a row that compute the same rows of every batch, each a part of their tokens.
        group: of all processes, over which they talk; None is the default one.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    context_parallel: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """This process's part of every batch."""
        return Shard(self.rank // self.context_parallel, self.world_size // self.context_parallel)

    @property
    def process(self) -> Shard:
        """This process's part of what no two processes should do."""
        return Shard(self.rank, self.world_size)

    def global_rng(self) -> AbstractContextManager[object]:
        """A context in which random draws are this process's rows of those of the whole batch."""
        return GlobalBatchRNG(self.shard) if self.shard.world_size > 1 else nullcontext()

    def all_reduce_mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes; all must have the same names."""
        if self.world_size == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, group=self.group)
        return dict(zip(metrics, (values / self.world_size).tolist(), strict=True))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def all_gather_object(self, value: Value) -> list[Value]:
        """Every process's value, in their order, on all of them."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def all_gather_rows(self, value: Value) -> list[Value]:
        """The value of every process that has rows of its own of a batch, in their order, on all of them."""
        return self.all_gather_object(value)[:: self.context_parallel]

    def all_gather(self, rows: Tensor) -> Tensor:
        """All processes' rows of a batch, in order, with gradient: for losses that are not a mean over samples."""
        if self.shard.world_size == 1:
            return rows
        group = self.group or dist.group.WORLD if self.context_parallel == 1 else self.context_mesh["data"].get_group()
        whole: Tensor = _AllGather.apply(rows, group)  # type: ignore[no-untyped-call]
        return whole

    def sync_unsharded_grads(self, weights: Iterable[Tensor]) -> None:
        """Averages the gradients of unsharded weights over the processes; FSDP averages the others."""
        if self.world_size == 1:
            return
        for weight in weights:
            if weight.grad is not None and not isinstance(weight.grad, DTensor):
                dist.all_reduce(weight.grad, group=self.group)
                weight.grad /= self.world_size

    def broadcast(self, module: nn.Module) -> None:
        """Copies the main process's weights of an unsharded module to the others."""
        if self.world_size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0, group=self.group)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process runs the block first, the others after it: they find the files it wrote."""
        if not self.is_main_process:
            self.barrier()
        yield
        if self.is_main_process:
            self.barrier()

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def beside(self) -> DistContext:
        """The same processes with a gloo group of their own, for another thread. Every process calls it."""
        return self if self.world_size == 1 else replace(self, group=dist.new_group(backend="gloo"))

    @cached_property
    def context_mesh(self) -> DeviceMesh:
        """The processes by rows of a batch and by tokens of a sample; diffusers names the latter."""
        shape = (self.shard.world_size, 1, self.context_parallel)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))

    def mesh(self, group: int | None = None) -> DeviceMesh:
        """All processes as one dimension; or, with `group`, replicas each sharded over `group` processes (hybrid
        sharding).

        Raises:
            UserError: `group` does not divide the number of processes.
        """
        if group is None or group == self.world_size:
            return init_device_mesh(self.device.type, (self.world_size,))
        if self.world_size % group:
            raise UserError(f"train.fsdp_shard_size {group} does not divide the {self.world_size} processes")
        return init_device_mesh(
            self.device.type, (self.world_size // group, group), mesh_dim_names=("replicate", "shard")
        )


class _AllGather(torch.autograd.Function):
    """The rows of all processes of a group. Torch's own has no gradient in a part of gloo's processes (2.13)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows.contiguous()) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


@contextmanager
def open_run(dist: DistContext, directory: str | Path, recipe: Recipe, **options: Any) -> Iterator[RunDir]:
    """The run in a directory for several processes: the main process locks it, the others only read."""
    with dist.main_process_first():
        run = RunDir(directory, recipe, read_only=not dist.is_main_process, **options)
    with run:
        yield run


@contextmanager
def init_distributed(device: str | torch.device = AUTO) -> Iterator[DistContext]:
    """Joins the process group if torchrun or Ray Train started this process; otherwise it is the only one.

    Args:
        device: of several processes on GPUs, each takes the one of its local rank: cuda, without a number.

    Raises:
        UserError: there is no such device, or there are more processes on a machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistContext(device=resolve_device(device))
        return
    chosen = parse_device(device)
    if chosen.index is not None:
        raise UserError(f"device {device}: every process takes a GPU of its own; use cuda, or auto")
    if chosen.type == "cuda" and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} has no GPU (there are {torch.cuda.device_count()}); start fewer processes"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    chosen = resolve_device(chosen)
    if dist.is_initialized():  # by Ray Train
        yield DistContext(dist.get_rank(), dist.get_world_size(), chosen)
        return
    store, rank, count = next(rendezvous("env://"))
    # torchrun's store still has the addresses of processes that it restarted: each attempt takes keys of its own
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
    try:
        yield DistContext(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()
