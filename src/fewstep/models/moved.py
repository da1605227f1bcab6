"""Paths of models in the files of other models: stored so that a project can be moved, and found after a move."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fewstep.models.components import BUNDLED_MODELS
from fewstep.models.family import MODEL_INDEX
from fewstep.models.fingerprint import path_fingerprint


def stored_path(path_or_name: str, folder: Path) -> str:
    """How a file in ``folder`` names a model: a local one by its path from the folder, which starts with a dot; a
    bundled one and a hub id as they are."""
    path = Path(path_or_name).expanduser()
    if path_or_name in BUNDLED_MODELS or not (path / MODEL_INDEX).is_file():
        return path_or_name
    try:
        relative = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive of Windows
        return str(path.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def find_moved(stored: str, folder: Path, fingerprint: str | None) -> str:
    """The model that a file in ``folder`` names: where it is, or where it went.

    Looked for from the folder, from the working directory, and from the folders above both, also by the last parts of
    the path; there, and where another model took its place, only a model of this fingerprint counts. Without any,
    the path from the folder, or the name as it is.
    """
    if stored in BUNDLED_MODELS:
        return stored
    path = folder / stored if stored.startswith(".") else Path(stored).expanduser()
    here = Path(os.path.normpath(path.absolute()))
    candidates = [here, *_elsewhere(stored, folder)]
    models = [each for each in dict.fromkeys(candidates) if (each / MODEL_INDEX).is_file()]
    if fingerprint is None:  # written by an earlier version, relative to the project's folder
        whole = PurePosixPath(stored).parts
        models = [each for each in models if each.parts[-len(whole) :] == whole or each == here]
    else:
        same = [each for each in models if path_fingerprint(each) == fingerprint]
        if not same and here in models:
            warnings.warn(f"{here}: has changed since {folder} was made of it", stacklevel=3)
        models = same or [each for each in models if each == here]
    if models:
        return str(models[0])
    return str(here) if stored.startswith(".") else stored


def _elsewhere(stored: str, folder: Path) -> Iterator[Path]:
    """Where a moved model may be: the path, then its last parts alone, below the folders above."""
    parts = [part for part in PurePosixPath(stored).parts if part not in ("/", ".", "..")]
    above = dict.fromkeys([Path.cwd(), *folder.resolve().parents, *Path.cwd().parents])
    for start in range(len(parts)):
        for base in above:
            yield base.joinpath(*parts[start:])
