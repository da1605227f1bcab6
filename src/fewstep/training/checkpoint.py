"""Checkpoints that are complete or absent: written aside, checksummed, synced and renamed.

checkpoints/step_00000500/
    manifest.json           {"format": 2, "step": 500, "files": {name: sha256, ...}}
    state.json              small values (counters, data position, ...)
    shard-*.safetensors     each process's part of all groups of tensors (see `dcp`)
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from fewstep.atomic import atomic_folder, is_partial, partial_path
from fewstep.errors import UserError
from fewstep.machine import reason
from fewstep.training import dcp
from fewstep.training.distributed import DistContext

FORMAT = 2
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: named groups of tensors in the folder `path`, and a `state` of JSON values.

    Every process calls its methods.
    """

    step: int
    path: Path
    state: dict[str, Any]

    def shapes(self, group: str) -> dict[str, torch.Size]:
        """Names and shapes of a group's tensors; empty if there is none."""
        return dcp.shapes(self.path, group)

    def read(self, group: str) -> dict[str, Tensor]:
        """A group's tensors, whole, on the CPU."""
        return dcp.read(self.path, group)

    @torch.no_grad()
    def load_into(self, group: str, live: Mapping[str, Tensor]) -> None:
        """Copies a group into tensors of the same names and shapes, sharded or not.

        Raises: RuntimeError if names or shapes differ.
        """
        shapes = self.shapes(group)
        if live.keys() != shapes.keys():
            raise RuntimeError(f"its tensors differ: {', '.join(sorted(live.keys() ^ shapes.keys())[:3])}, ...")
        for name, tensor in live.items():
            if tensor.shape != shapes[name]:
                raise RuntimeError(f"{name} has shape {tuple(shapes[name])} there and {tuple(tensor.shape)} here")
        dcp.load_into(self.path, group, live)


class CorruptCheckpoint(Exception):
    """A checkpoint that is incomplete or changed; the message names the file."""


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

    Older ones are deleted after the new one is on the disk. Every process calls it and writes its part.

    Raises: UserError if it cannot be written.
    """
    dist = dist or DistContext()
    target = directory / f"{PREFIX}{step:08d}"
    aside = partial_path(target)
    if dist.is_main_process and directory.exists():
        for leftover in filter(is_partial, directory.iterdir()):
            shutil.rmtree(leftover)
    try:
        with atomic_folder(target) if dist.is_main_process else nullcontext():
            dist.barrier()
            dcp.write(aside, groups, dist.group)
            if dist.is_main_process:
                (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            dist.barrier()
            files = _checksums(sorted(aside.iterdir()), dist)
            if dist.is_main_process:
                manifest = {"format": FORMAT, "step": step, "files": files}
                (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if dist.is_main_process:
            old = [path for path in list_checkpoints(directory) if _step(path) <= step and _step(path) not in protect]
            for path in old[:-keep]:
                shutil.rmtree(path)
        dist.barrier()
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        raise UserError(
            f"{target}: this checkpoint cannot be written ({reason(failure)}); nothing was lost, earlier ones are "
            "unchanged"
        ) from error
    return target


def load(path: Path, dist: DistContext | None = None) -> Checkpoint:
    """The checkpoint in folder `path`.

    Raises: CorruptCheckpoint if a file is missing, changed or unreadable; UserError if it has another format.
    """
    dist = dist or DistContext()
    found, problem = None, None
    try:
        found = _checked(path, dist)
    except CorruptCheckpoint as corrupt:
        problem = str(corrupt)
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error})"
    problems = [each for each in dist.all_gather_object(problem) if each is not None]
    if found is None or problems:
        raise CorruptCheckpoint(problems[0])
    return found


def _checked(path: Path, dist: DistContext) -> Checkpoint:
    """Each process reads the manifest and checks its share of the files."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path}: has checkpoint format {manifest['format']}, this version of fewstep reads format {FORMAT}; "
            "resume with the version that wrote it, or start over with --overwrite"
        )
    for name, sha256 in list(manifest["files"].items())[dist.rank :: dist.world_size]:
        if _sha256(path / name) != sha256:
            raise CorruptCheckpoint(f"{name} is damaged (its checksum differs)")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(manifest["step"], path, state)


def latest(directory: Path, notice: Callable[[str], None], dist: DistContext | None = None) -> Checkpoint | None:
    """The newest complete checkpoint in `directory`, or None; ``notice`` gets a line for each corrupt one.

    Raises: UserError if one has another format.
    """
    for path in reversed(list_checkpoints(directory)):
        try:
            return load(path, dist)
        except CorruptCheckpoint as problem:
            notice(f"{path}: skipped, {problem}")
    return None


def rollback(directory: Path, step: int, dist: DistContext | None = None) -> Checkpoint | None:
    """The newest complete checkpoint up to `step`, after deleting later ones; None, and no deletion, without one."""
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
    """The checkpoint of one step. Raises: CorruptCheckpoint, or UserError as `load`."""
    return load(directory / f"{PREFIX}{step:08d}", dist)


def list_checkpoints(directory: Path) -> list[Path]:
    """The folders of all checkpoints in `directory`, complete or corrupt, oldest first."""
    own = (path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted((path for path in own if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _checksums(files: list[Path], dist: DistContext) -> dict[str, str]:
    """SHA-256 by name; each process reads its share of the files."""
    mine = {file.name: _sha256(file) for file in files[dist.rank :: dist.world_size]}
    return dict(sorted(pair for part in dist.all_gather_object(mine) for pair in part.items()))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
