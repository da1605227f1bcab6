"""A program for torchrun: random draws inside a loss, as the whole batch has them, saved by the main process."""

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.global_rng import shared_draws
from fewstep.core.method import Shard
from fewstep.training.distributed import DistContext, init_distributed

ROWS = 4


def draws(shard: Shard) -> dict[str, Tensor]:
    """Draws with a row per sample, by every supported function."""
    rows = shard.rows(ROWS)
    count = rows.stop - rows.start
    x = torch.zeros(ROWS, 3, 4, 5)[rows]
    return {
        "randn": torch.randn(count, 17),
        "rand of a tuple": torch.rand((count, 2), dtype=torch.float64),
        "randint": torch.randint(2, 90, (count,)),
        "randint by keywords": torch.randint(high=90, size=(count, 3)),
        "randn_like": torch.randn_like(x),
        "rand_like": torch.rand_like(x[:, 0, 0, 0]),
        "randint_like": torch.randint_like(x, 50),
        "channels last": torch.randn_like(x.contiguous(memory_format=torch.channels_last)),
        "transposed": torch.randn_like(x.transpose(1, 3)),
        "no dimensions": torch.stack([torch.rand(()), torch.randint(9, ()).float()]).expand(count, 2),
        "own generator": torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(5))[rows],
    }


def shared() -> list[Tensor]:
    with shared_draws():
        return [torch.rand(3), torch.randperm(5), torch.empty(2).normal_()]


def main(dist: DistContext, out: str) -> None:
    torch.manual_seed(3)
    with dist.global_rng():
        found = draws(dist.shard)
        levels = shared()
        found["after"] = torch.randn(ROWS // dist.world_size)
    whole = {name: torch.cat(dist.all_gather_object(part)) for name, part in found.items()}
    for rank, other in enumerate(dist.all_gather_object(levels)):
        assert all(map(torch.equal, other, levels)), rank
    whole |= {f"shared {i}": level for i, level in enumerate(levels)}
    if dist.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, out)


if __name__ == "__main__":
    with init_distributed() as dist:
        main(dist, sys.argv[1])
