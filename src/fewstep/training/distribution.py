"""Several processes as one: started by torchrun, weights sharded by FSDP2, batches divided, random draws as of one.

A training on N processes takes the steps that one process would take with the same batches: each holds a part of every
batch, gradients are averaged, and noise is drawn for the whole batch before each keeps its own part.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from fewstep.errors import UserError
from fewstep.models.zimage import ZImageDenoiser, blocks_of
from fewstep.recipes.schema import Recipe
from fewstep.training.run import Run

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Who this process is among `world`; the only one, unless torchrun says otherwise."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: Any) -> Any:
        """This process's rows of a batch: of each part, if it is a tuple.

        Raises:
            UserError: the batch cannot be divided.
        """
        if self.world == 1:
            return batch
        if isinstance(batch, tuple | list):
            return tuple(self.share(part) for part in batch)
        if len(batch) % self.world:
            raise UserError(f"train.batch_size {len(batch)} is no multiple of the {self.world} processes")
        each = len(batch) // self.world
        return batch[self.rank * each : (self.rank + 1) * each]

    def random(self) -> Any:
        """A context in which `torch.randn_like` and `rand_like` draw for all processes and give this one's rows."""
        return _AsOne(self) if self.world > 1 else nullcontext()

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes; all must have the same names."""
        if self.world == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world).tolist(), strict=True))

    def largest(self, *values: float) -> list[float]:
        """The largest of each value over the processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in their order, on all of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def together(self, rows: Tensor) -> Tensor:
        """All processes' rows of a batch, in order, with gradient: for losses that are no mean over samples."""
        if self.world == 1:
            return rows
        return torch.cat(all_gather(rows.contiguous()))

    def average_gradients(self, weights: Iterable[Tensor]) -> None:
        """Averages over the processes what FSDP has not averaged: gradients of weights that each holds whole."""
        if self.world == 1:
            return
        for weight in weights:
            if weight.grad is not None and not isinstance(weight.grad, DTensor):
                dist.all_reduce(weight.grad)
                weight.grad /= self.world

    def agree(self, module: nn.Module) -> None:
        """Gives a module that every process holds whole the first one's weights."""
        if self.world > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through alone, the others after it: they find what it has written."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def mesh(self, group: int | None = None) -> DeviceMesh:
        """All processes in a row; or, with `group`, copies side by side, each sharded over so many (hybrid sharding).

        Raises:
            UserError: the processes cannot be divided so.
        """
        if group is None or group == self.world:
            return init_device_mesh(self.device.type, (self.world,))
        if self.world % group:
            raise UserError(f"train.shard_group {group} does not divide the {self.world} processes")
        return init_device_mesh(self.device.type, (self.world // group, group), mesh_dim_names=("replicate", "shard"))


@contextmanager
def open_run(ranks: Ranks, directory: str | Path, recipe: Recipe, **options: Any) -> Iterator[Run]:
    """The run in a directory for several processes: the first claims it, the others follow."""
    with ranks.in_turn():
        run = Run(directory, recipe, follows=not ranks.first, **options)
    with run:
        yield run


class _AsOne(TorchFunctionMode):
    """Draws of noise like a tensor, as one process would make them for the whole batch."""

    _draws: Mapping[Any, Callable[..., Tensor]] = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self._draws:
            return func(*args, **(kwargs or {}))
        like: Tensor = args[0]
        count = len(like)
        whole = self._draws[func](count * self.ranks.world, *like.shape[1:], dtype=like.dtype, device=like.device)
        return whole[self.ranks.rank * count : (self.ranks.rank + 1) * count]


@contextmanager
def launched() -> Iterator[Ranks]:
    """Joins the other processes if torchrun started this one; alone otherwise.

    Raises:
        UserError: there are more processes on a machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def shard(denoiser: ZImageDenoiser, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Shard a denoiser's weights over the mesh, block by block (FSDP2's `fully_shard`): each block is gathered when it
    speaks, and let go after.

    Args:
        bf16: weights are sent, and speak, in bf16; what each holds, and gradients on their way, stay as they are.
    """
    model = denoiser.transformer
    # rotations and noise levels must stay fp32, so what goes in is not cast
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    compute = denoiser.run_block
    for block in blocks_of(model):
        # FSDP gathers around a module's own forward, so the block must be called as one
        block.forward = types.MethodType(compute, block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    denoiser.run_block = lambda block, x, rotations, condition: block(x, rotations, condition)
    # by default the outermost weights stay gathered, and would not see it when others are copied into the shards
    fully_shard(denoiser, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(denoiser, "features")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor divided as `reference` is."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """A sharded module's weights put together, on every process."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}
