"""Tensors of several processes on disk, by torch's distributed checkpoint (DCP): each process writes its own part, and
any number of processes reads them again. In safetensors files, without the pickled index that DCP writes by default."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def write(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Every process's part of named groups of tensors, as ``shard-*.safetensors`` in a folder that is there.

    Raises: dcp.CheckpointException, on every process, if one cannot write.
    """
    flat = {_key(group, name): tensor.detach() for group, tensors in groups.items() for name, tensor in tensors.items()}
    dcp.save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def shapes(folder: Path, group: str) -> dict[str, torch.Size]:
    """Names and whole shapes of a group's tensors."""
    return {name: meta.size for name, meta in _index(folder, group).items()}


def read(folder: Path, group: str) -> dict[str, Tensor]:
    """A group's tensors, put together, on every process."""
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in _index(folder, group).items()
    }
    fill(folder, group, tensors)
    return tensors


def fill(folder: Path, group: str, live: Mapping[str, Tensor]) -> None:
    """Copies a group into `live`, of which each process has its part, or the only one all of it."""
    alone = not dist.is_initialized()
    targets = {_key(group, name): tensor.detach() for name, tensor in live.items()}
    dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)


def _index(folder: Path, group: str) -> dict[str, TensorStorageMetadata]:
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    start = _key(group, "")
    return {
        key.removeprefix(start): meta
        for key, meta in found.items()
        if key.startswith(start) and isinstance(meta, TensorStorageMetadata)
    }


def _key(group: str, name: str) -> str:
    return f"{group}|{name}"
