"""Tensors on disk by torch's distributed checkpoint (DCP): each process writes its own part, and any number of
processes reads them again. In safetensors files, without the pickled index that DCP writes by default."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

SHARD_PREFIX = "shard-"


class _Shards(FileSystem):
    """Lists the files that ``write`` wrote: DCP opens every safetensors file of a folder, whoever left it there."""

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [file for file in super().ls(path) if Path(file).name.startswith(SHARD_PREFIX)]


class _ShardReader(HuggingFaceStorageReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.fs = _Shards()


def write(
    folder: Path, groups: Mapping[str, Mapping[str, Tensor]], process_group: dist.ProcessGroup | None = None
) -> None:
    """Write this process's part of named groups of tensors, as ``shard-*.safetensors`` in an existing folder.

    Every process calls it. Raises: dcp.CheckpointException, on every process, if one cannot write.

    Args:
        process_group: of all processes, over which they agree; None is the default one.
    """
    flat = {
        _key(group, name): tensor.detach().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _one_process_is_fine()
    dcp.save(flat, storage_writer=writer, process_group=process_group, no_dist=_alone())


def shapes(folder: Path, group: str) -> dict[str, torch.Size]:
    """Names and global shapes of a group's tensors; empty for a group that was not written."""
    return {name: meta.size for name, meta in _index(folder, group).items()}


def read(folder: Path, group: str) -> dict[str, Tensor]:
    """A group's whole tensors, on the CPU of every process."""
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in _index(folder, group).items()
    }
    load_into(folder, group, tensors)
    return tensors


def load_into(folder: Path, group: str, live: Mapping[str, Tensor]) -> None:
    """Copy a group into tensors of the same names and shapes, sharded or not. Every process calls it."""
    if not live:
        return
    targets = {_key(group, name): tensor.detach() for name, tensor in live.items()}
    _one_process_is_fine()
    dcp.load(targets, storage_reader=_ShardReader(folder), no_dist=_alone())


def _alone() -> bool:
    return not dist.is_initialized()


def _one_process_is_fine() -> None:
    """Turns off DCP's warning about a single process; for good, as a thread must not restore the process's filters."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _index(folder: Path, group: str) -> dict[str, TensorStorageMetadata]:
    found = _ShardReader(folder).read_metadata().state_dict_metadata
    start = _key(group, "")
    return {
        key.removeprefix(start): meta
        for key, meta in found.items()
        if key.startswith(start) and isinstance(meta, TensorStorageMetadata)
    }


def _key(group: str, name: str) -> str:
    return f"{group}|{name}"
