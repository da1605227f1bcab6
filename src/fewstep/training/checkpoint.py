"""Checkpoints that are whole or not there: written aside, checksummed, moved into place in one step.

checkpoints/step_00000500/
    manifest.json           {"format": 1, "step": 500, "files": {name: sha256, ...}}
    state.json              small values (counters, data position, ...)
    <group>.safetensors     one file for each named group of tensors
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError

FORMAT = 1
PREFIX = "step_"


@dataclass
class Checkpoint:
    """What a checkpoint holds: `groups` of named tensors (on the CPU) and a `state` of JSON values."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class BrokenCheckpoint(Exception):
    """A checkpoint that is torn or changed; the message says how."""


def save(
    directory: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Writes the checkpoint of `step` into `directory` and returns its folder; then deletes all but the newest `keep`.

    Nothing older is touched before the new one is on the disk. Raises: UserError if it cannot be written.
    """
    target = directory / f"{PREFIX}{step:08d}"
    aside = directory / f".{target.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for torn in directory.glob(".*.partial"):
            shutil.rmtree(torn)
        aside.mkdir()
        for name, tensors in groups.items():
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, aside / f"{name}.safetensors")
        (aside / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if target.exists():  # a broken one: a whole one would have been resumed from
            shutil.rmtree(target)
        aside.rename(target)
        _sync(directory)
        for old in [path for path in steps(directory) if _step(path) <= step][:-keep]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{target}: cannot write this checkpoint ({reason}); earlier ones are as they were") from error
    return target


def load(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`. Raises: BrokenCheckpoint if a file is missing, changed or unreadable."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BrokenCheckpoint(f"has format {manifest['format']}, this version reads {FORMAT}")
        for name, sha256 in manifest["files"].items():
            if _sha256(path / name) != sha256:
                raise BrokenCheckpoint(f"{name} is damaged (its checksum differs)")
        groups = {Path(n).stem: load_file(path / n) for n in manifest["files"] if n.endswith(".safetensors")}
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(manifest["step"], groups, state)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BrokenCheckpoint(f"cannot be read ({error})") from None


def latest(directory: Path, notice: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint in `directory`, or None; each broken one passed over is named through `notice`."""
    for path in reversed(steps(directory)):
        try:
            return load(path)
        except BrokenCheckpoint as problem:
            notice(f"{path}: skipped, {problem}")
    return None


def rewind(directory: Path, step: int, delete: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint that is no later than `step`; later ones are deleted. None changes nothing."""
    for path in reversed(steps(directory)):
        if _step(path) > step:
            continue
        try:
            found = load(path)
        except BrokenCheckpoint:
            continue
        for later in steps(directory):
            if delete and _step(later) > found.step:
                shutil.rmtree(later)
        return found
    return None


def steps(directory: Path) -> list[Path]:
    """The folders of all checkpoints in `directory`, whole or broken, oldest first."""
    return sorted((path for path in directory.glob(f"{PREFIX}*") if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


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
