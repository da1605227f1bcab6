"""Troubles of the machine, such as a full disk, a quota or a damaged file, as one line that names the file.

The libraries that read and write files have exceptions of their own. Here is the one place that knows them all.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fewstep.errors import UserError

# Never a bug, even where the error names no file.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# The machine's if the error names a file.
_FILE_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.ESTALE, errno.ETXTBSY),
}


def file_errors() -> tuple[type[Exception], ...]:
    """What reading or writing a file raises where the machine or the file is at fault."""
    own = (OSError, SafetensorError, sqlite3.Error, tarfile.TarError, zlib.error, EOFError)
    arrow = sys.modules.get("pyarrow")  # only an imported pyarrow can have raised its exceptions
    return own if arrow is None else (*own, arrow.ArrowException)


def reason(error: BaseException) -> str:
    """Why reading or writing failed, in one line of at most 200 characters."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        error = error.args[0][0][2]  # of all files that could not be copied, the first
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def read_error(path: str | Path, error: Exception, advice: str = "") -> UserError:
    """The user error for a file that could not be read; ``advice`` is what to do about it."""
    return UserError(f"{_named(path, error)}: cannot be read ({reason(error)}){advice and f'; {advice}'}")


def write_error(path: str | Path, error: Exception, advice: str = "") -> UserError:
    """The user error for a file that could not be written; ``advice`` is what to do about it."""
    return UserError(f"{_named(path, error)}: cannot be written ({reason(error)}){advice and f'; {advice}'}")


@contextmanager
def reading(path: str | Path, advice: str = "") -> Iterator[None]:
    """Inside, ``path`` is read. Raises: UserError, one line with its name, if the machine or the file is at fault."""
    try:
        yield
    except file_errors() as error:
        raise read_error(path, error, advice) from error


@contextmanager
def writing(path: str | Path, advice: str = "") -> Iterator[None]:
    """Inside, ``path`` is written. Raises: UserError, one line with its name, if the machine is at fault."""
    try:
        yield
    except file_errors() as error:
        raise write_error(path, error, advice) from error


def describe(error: OSError) -> str | None:
    """One line for an error that was not caught where the file was used; None if it may be a bug."""
    if error.errno in _STORAGE_ERRORS or (error.errno in _FILE_ERRORS and error.filename is not None):
        return f"{error.filename}: {reason(error)}" if error.filename else reason(error)
    return None


def _named(path: str | Path, error: Exception) -> str | Path:
    """``path``, unless the error names a file elsewhere: one that was read in order to write ``path``."""
    named = error.filename if isinstance(error, OSError) else None
    if not isinstance(named, str):
        return path
    folder = Path(path).absolute().parent
    other = Path(named).absolute()
    return path if other.is_relative_to(folder) or folder.is_relative_to(other) else named
