"""Checkpoints that are whole or not there: written aside, checksummed, moved into place in one step.

checkpoints/step_00000500/
    manifest.json           {"format": 1, "step": 500, "sharded": false, "files": {name: sha256, ...}}
    state.json              small values (counters, data position, ...)
    <group>.safetensors     one file for each named group of tensors; or, of several processes,
    shard-00001-....        one file each with its part of all groups (see `sharded`)
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from fewstep.core.dtensor import distribute_like
from fewstep.errors import UserError
from fewstep.training import dcp as sharded
from fewstep.training.distributed import DistContext

FORMAT = 1
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: named groups of tensors in the folder `path`, and a `state` of JSON values."""

    step: int
    path: Path
    state: dict[str, Any]
    sharded: bool

    def shapes(self, group: str) -> dict[str, torch.Size]:
        """Names and shapes of a group's tensors; empty if there is none."""
        if self.sharded:
            return sharded.shapes(self.path, group)
        file = self.path / f"{group}.safetensors"
        if not file.exists():
            return {}
        with safe_open(file, "pt") as tensors:
            return {name: torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118

    def read(self, group: str) -> dict[str, Tensor]:
        """A group's tensors, whole, on the CPU; of several processes all call it."""
        if self.sharded:
            return sharded.read(self.path, group)
        return load_file(self.path / f"{group}.safetensors")

    @torch.no_grad()
    def load_into(self, group: str, live: Mapping[str, Tensor]) -> None:
        """Copies a group into tensors of the same names and shapes, sharded or not; every process calls it.

        Raises: RuntimeError if names or shapes differ.
        """
        shapes = self.shapes(group)
        if live.keys() != shapes.keys():
            raise RuntimeError(f"its tensors differ: {', '.join(sorted(live.keys() ^ shapes.keys())[:3])}, ...")
        for name, tensor in live.items():
            if tensor.shape != shapes[name]:
                raise RuntimeError(f"{name} is {tuple(shapes[name])} there and {tuple(tensor.shape)} here")
        if not live:
            return
        if self.sharded:
            sharded.fill(self.path, group, live)
            return
        with safe_open(self.path / f"{group}.safetensors", "pt") as tensors:
            for name, tensor in live.items():
                tensor.copy_(distribute_like(tensors.get_tensor(name), tensor))


class CorruptCheckpoint(Exception):
    """A checkpoint that is torn or changed; the message says how."""


def save(
    directory: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    protect: Collection[int] = (),
    dist: DistContext | None = None,
) -> Path:
    """Writes the checkpoint of `step` into `directory` and returns its folder; then deletes all but the newest `keep`
    and those of the steps in `protect`.

    Nothing older is touched before the new one is on the disk. Of several processes all call it, and each writes its
    part. Raises: UserError if it cannot be written.
    """
    dist = dist or DistContext()
    target = directory / f"{PREFIX}{step:08d}"
    aside = directory / f".{target.name}.partial"
    try:
        if dist.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            for torn in directory.glob(".*.partial"):
                shutil.rmtree(torn)
            aside.mkdir()
            (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        dist.barrier()
        if dist.world_size > 1:
            sharded.write(aside, groups)
        else:
            for name, tensors in groups.items():
                contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
                save_file(contiguous, aside / f"{name}.safetensors")
        files = _checksums(sorted(aside.iterdir()), dist)
        if dist.is_main_process:
            manifest = {"format": FORMAT, "step": step, "sharded": dist.world_size > 1, "files": files}
            (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                _sync(path)
            if target.exists():  # a broken one: a whole one would have been resumed from
                shutil.rmtree(target)
            aside.rename(target)
            _sync(directory)
            old = [path for path in list_checkpoints(directory) if _step(path) <= step and _step(path) not in protect]
            for path in old[:-keep]:
                shutil.rmtree(path)
        dist.barrier()
    except (OSError, SafetensorError, CheckpointException) as error:
        if dist.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{target}: cannot write this checkpoint ({reason}); earlier ones are as they were") from error
    return target


def load(path: Path, dist: DistContext | None = None) -> Checkpoint:
    """The checkpoint in folder `path`. Raises: BrokenCheckpoint if a file is missing, changed or unreadable."""
    dist = dist or DistContext()
    found, problem = None, None
    try:
        found = _checked(path, dist)
    except CorruptCheckpoint as broken:
        problem = str(broken)
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        problem = f"cannot be read ({error})"
    problems = [told for told in dist.all_gather_object(problem) if told is not None]
    if found is None or problems:
        raise CorruptCheckpoint(problems[0])
    return found


def _checked(path: Path, dist: DistContext) -> Checkpoint:
    """Each process reads the manifest and looks at its share of the files."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise CorruptCheckpoint(f"has format {manifest['format']}, this version reads {FORMAT}")
    for name, sha256 in list(manifest["files"].items())[dist.rank :: dist.world_size]:
        if _sha256(path / name) != sha256:
            raise CorruptCheckpoint(f"{name} is damaged (its checksum differs)")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(manifest["step"], path, state, manifest.get("sharded", False))


def latest(directory: Path, notice: Callable[[str], None], dist: DistContext | None = None) -> Checkpoint | None:
    """The newest whole checkpoint in `directory`, or None; each broken one passed over is named through `notice`."""
    for path in reversed(list_checkpoints(directory)):
        try:
            return load(path, dist)
        except CorruptCheckpoint as problem:
            notice(f"{path}: skipped, {problem}")
    return None


def rollback(directory: Path, step: int, dist: DistContext | None = None) -> Checkpoint | None:
    """The newest whole checkpoint that is no later than `step`; later ones are deleted. None changes nothing."""
    dist = dist or DistContext()
    for path in reversed(list_checkpoints(directory)):
        if _step(path) > step:
            continue
        try:
            found = load(path, dist)
        except CorruptCheckpoint:
            continue
        for later in list_checkpoints(directory):
            if dist.is_main_process and _step(later) > found.step:
                shutil.rmtree(later)
        dist.barrier()
        return found
    return None


def load_step(directory: Path, step: int, dist: DistContext | None = None) -> Checkpoint:
    """The checkpoint of one step. Raises: BrokenCheckpoint."""
    return load(directory / f"{PREFIX}{step:08d}", dist)


def list_checkpoints(directory: Path) -> list[Path]:
    """The folders of all checkpoints in `directory`, whole or broken, oldest first."""
    return sorted((path for path in directory.glob(f"{PREFIX}*") if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _checksums(files: list[Path], dist: DistContext) -> dict[str, str]:
    """SHA-256 by name; each process reads its share of the files."""
    mine = {file.name: _sha256(file) for file in files[dist.rank :: dist.world_size]}
    return dict(sorted(pair for part in dist.all_gather_object(mine) for pair in part.items()))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
