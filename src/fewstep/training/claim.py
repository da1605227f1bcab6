"""Taking a run's directory, so that a run that is refused leaves it as it was."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ASIDE = ".earlier.partial"  # an earlier run, until the new one has begun


class Claim:
    """What a new run changes in its directory before it begins: taken back if it is refused, kept when it has begun.

    Args:
        directory: made if it is not there.
        files: names of the files that the run writes at once.

    Raises:
        OSError: the directory cannot be made, or a file not read.
    """

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        self.directory, self.files, self.kept = directory, files, False
        self._made = [each for each in (directory, *directory.parents) if not each.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / name for name in files]
        self._earlier = {path: path.read_bytes() for path in paths if path.exists()}
        self._others = self._names()

    def set_aside(self, paths: Sequence[Path]) -> None:
        """Move an earlier run's files and folders out of the way. Raises: OSError."""
        aside = self.directory / ASIDE
        for path in paths:
            aside.mkdir(exist_ok=True)
            _delete(aside / path.name)  # of a process that was killed
            path.rename(aside / path.name)
        self._others = self._names()

    def keep(self) -> None:
        """The run has begun: the earlier one is deleted."""
        self.kept = True
        _delete(self.directory / ASIDE)

    def take_back(self) -> None:
        """Restore the directory, unless the run has begun or written other files than its first ones."""
        if self.kept or self._names() != self._others:
            return
        for path in (self.directory / name for name in self.files):
            if path in self._earlier:
                path.write_bytes(self._earlier[path])
            else:
                path.unlink(missing_ok=True)
        aside = self.directory / ASIDE
        for path in sorted(aside.iterdir()) if aside.exists() else ():
            path.rename(self.directory / path.name)
        for folder in (aside, *self._made):
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()

    def _names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()} - {*self.files, ASIDE}


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
