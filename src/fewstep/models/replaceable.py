"""Whether a model may be saved as a folder."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import UserError
from fewstep.models.family import MODEL_INDEX
from fewstep.outputs import check_folder


def check_replaceable(folder: Path) -> None:
    """Check that a model can be saved as this folder: it is new, empty, or a model, which is replaced.

    Raises:
        UserError: it holds other files, which saving would delete; or it cannot be written.
    """
    check_folder(folder)
    if folder.is_dir() and not (folder / MODEL_INDEX).exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files than a model, and saving would delete them; use another folder")
