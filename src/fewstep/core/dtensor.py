"""Conversion between tensors sharded over processes and full ones."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on every process; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A sharded module's weights, gathered on every process."""
    return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}


def copy_full(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
