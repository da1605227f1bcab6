"""Files and folders that are complete or absent: written aside, synced to the disk, then renamed.

Whatever goes wrong in between, the file or folder of that name is the one from before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fewstep.locks import exclusive
from fewstep.machine import writing

_NOTHING_LOST = "nothing was lost, earlier files are unchanged"


def partial_path(path: Path) -> Path:
    """Where a file or folder is written before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    """Whether a path is what an interrupted write left behind."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def is_litter(path: Path) -> bool:
    """Whether a file is what an operating system or an interrupted write left behind: it belongs to nobody."""
    return is_partial(path) or path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db", "desktop.ini")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Inside, the caller writes the yielded path; it becomes ``path`` at the end, and is deleted after an error.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    path = Path(path)
    aside = partial_path(path)
    with writing(path, _NOTHING_LOST):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            try:
                yield aside
                _set_default_mode(aside)
                sync(aside)
                aside.replace(path)
                sync(path.parent)
            except BaseException:
                with suppress(OSError):
                    aside.unlink()
                raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Inside, the caller fills the yielded folder, which is empty; it becomes ``path`` at the end, in place of an
    earlier one, and is deleted after an error.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    path = Path(path)
    aside, old = partial_path(path), path.with_name(f".{path.name}.old.partial")
    with writing(path, _NOTHING_LOST):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            try:
                for leftover in (aside, old):
                    shutil.rmtree(leftover, ignore_errors=True)
                aside.mkdir()
                yield aside
                for written in aside.rglob("*"):
                    if written.is_file():
                        _set_default_mode(written)
                    sync(written)
                sync(aside)
                if path.exists():  # a folder with files in it cannot be replaced in one step
                    path.rename(old)
                aside.rename(path)
                sync(path.parent)
                shutil.rmtree(old, ignore_errors=True)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file. Raises: UserError if it cannot be written."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises: UserError if it cannot be written."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as aside:
        save_file(contiguous, aside, dict(metadata) if metadata is not None else None)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_default_mode(file: Path) -> None:
    """Give a file the permissions of any new file: safetensors writes files that only their owner can read."""
    file.chmod(0o666 & ~_umask())


@cache
def _umask() -> int:
    """Of this process; read once, as reading it sets it for a moment, in all threads."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
