"""Locks against other processes that write the same file or folder.

The system releases a lock when its process ends, however it ends: there are no stale ones. Windows, and file systems
without locks, have none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fewstep.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[Path] = set()  # by this process


def lock(path: str | Path) -> Callable[[], None]:
    """Lock a file or folder against other processes; returns the function that unlocks it.

    A folder is locked itself. For a file, or what does not exist yet, ``.<name>.lock`` is made beside it and deleted
    with the lock. The parent folder must exist.

    Raises:
        UserError: another process has the lock.
        OSError: the folder cannot be opened, or the lock's file cannot be made.
    """
    path = Path(path)
    key = path.absolute()
    descriptor, beside = _open(path)

    def unlock() -> None:
        _held.discard(key)
        if beside is not None:
            with suppress(OSError):
                beside.unlink()  # before it is unlocked: nobody can lock a file that is about to go
        if descriptor is not None:
            os.close(descriptor)

    _held.add(key)
    return unlock


@contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Inside, no other process writes this file or folder. Nothing happens where this process has locked it, or a
    folder above it, already. Errors as for :func:`lock`."""
    key = Path(path).absolute()
    if not _held.isdisjoint((key, *key.parents)):
        yield
        return
    unlock = lock(path)
    try:
        yield
    finally:
        unlock()


def _open(path: Path) -> tuple[int | None, Path | None]:
    """A locked descriptor, and the lock's file if it is not the folder itself."""
    if fcntl is None:
        return None, None
    while True:
        beside = None if path.is_dir() else path.with_name(f".{path.name}.lock")
        descriptor = os.open(path, os.O_RDONLY) if beside is None else os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{path}: another process is using it; wait for it, or stop it") from None
        except OSError:
            return descriptor, beside  # a file system without locks
        if _is_still_there(descriptor, beside or path):
            return descriptor, beside
        os.close(descriptor)  # its last owner deleted or replaced it in between


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
