"""Outputs are checked before the work that fills them: names, permissions, free space, what an image format can hold.

A check writes a small file and deletes it: permissions, quotas and read-only file systems have no other sure sign.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from fewstep.atomic import atomic_file
from fewstep.errors import UserError
from fewstep.locks import exclusive
from fewstep.machine import reading, reason, writing

FRAME_MILLISECONDS = 62  # of a video: Wan's 16 frames a second
_PROBE_BYTES = 4096  # a block: a full disk still takes empty files
_TRIAL_PIXELS = 2**20
_TEXT_CHUNK = "fewstep"
#: Pixels of a side in formats whose encoder prints to standard error what it refuses.
_LONGEST_SIDE = {"JPEG": 65_500, "MPO": 65_500, "PDF": 65_500}
# What Pillow raises for a picture that a format cannot hold.
_FORMAT_ERRORS = (OSError, ValueError, OverflowError, RuntimeError, struct.error)


def names_folder(out: str) -> bool:
    """Whether a name is a folder's: there is one, or it ends with a slash; or nothing is there, and it has no ending
    such as ``.png``."""
    path = Path(out)
    if out.endswith(("/", os.sep)) or os.path.isdir(path):
        return True
    return not os.path.exists(path) and not path.suffix


def check_folder(folder: str | Path) -> None:
    """Check that files can be written into a folder, which need not exist; nothing is left there.

    Raises:
        UserError: one line with the reason.
    """
    _probe(Path(folder))


def check_file(file: str | Path, suffix: str = "") -> None:
    """Check that a file can be written or replaced; nothing is left there.

    Args:
        suffix: what its name must end with, such as ".safetensors".

    Raises:
        UserError: one line with the reason.
    """
    file = Path(file)
    if os.path.isdir(file) or not file.name:
        raise UserError(f"{file}: is a folder; give the name of a file")
    if not file.name.endswith(suffix):
        raise UserError(f"{file}: the name of the file must end with {suffix}")
    _probe(file.parent, file.name)


def check_image(file: str | Path, width: int | None = None, height: int | None = None) -> None:
    """Check that an RGB image can be written as ``file``: its format, and, where given, its size in pixels.

    Raises:
        UserError: one line with the reason.
    """
    file = Path(file)
    name = _format(file)
    sizes = [(16, 16)] if width is None or height is None else _trial_sizes(width, height)
    for size in sizes:
        if problem := _problem(name, size):
            shown = "" if width is None else f" of {width} x {height} pixels"
            raise UserError(f"{file}: a picture{shown} cannot be saved as {name} ({problem}); use .png, or a folder")
    check_file(file)


def write_image(image: Image.Image, file: str | Path, text: str | None = None) -> None:
    """Write an image in the format that the file's name ends with; the file is complete or absent.

    Args:
        text: kept in the file where its format has a place for it, see :func:`image_text`.

    Raises:
        UserError: it cannot be written, or the format cannot hold it.
    """
    _save(image, Path(file), text)


def write_animation(frames: Sequence[Image.Image], file: str | Path, text: str | None = None) -> None:
    """Write frames as an animated WebP without loss, which repeats; the file is complete or absent.

    Args:
        text: as for :func:`write_image`.

    Raises:
        UserError: it cannot be written.
    """
    first, *more = frames
    options = {"append_images": more, "duration": FRAME_MILLISECONDS, "loop": 0, "lossless": True}
    _save(first, Path(file), text, save_all=True, **options)


def _save(image: Image.Image, file: Path, text: str | None, **options: Any) -> None:
    name = _format(file)
    with atomic_file(file) as aside:
        try:
            image.save(aside, name, **options, **({} if text is None else image_text(name, text)))
        except OSError:
            raise
        except _FORMAT_ERRORS as error:
            raise UserError(f"{file}: cannot be saved as {name} ({reason(error)}); use .png, or a folder") from error


def image_text(name: str, text: str) -> dict[str, Any]:
    """Options of Pillow's ``save`` that keep a text in ASCII in an image: for PNG in a text chunk named "fewstep", for
    JPEG and WebP in the EXIF field ImageDescription; none for other formats.

    Args:
        name: Pillow's name of the format.
    """
    if name == "PNG":
        chunks = PngInfo()
        chunks.add_text(_TEXT_CHUNK, text)
        return {"pnginfo": chunks}
    if name in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = text
        return {"exif": exif}
    return {}


def read_image_text(file: str | Path) -> str | None:
    """The text that :func:`image_text` kept in an image; None if there is none. Raises: UserError if it cannot be
    read."""
    with reading(file), Image.open(file) as image:
        found = image.info.get(_TEXT_CHUNK) or image.getexif().get(ExifTags.Base.ImageDescription)
    return found if isinstance(found, str) and found.startswith("{") else None


@contextmanager
def claimed_folder(folder: str | Path) -> Iterator[None]:
    """Inside, the folder exists and this process alone writes into it. New folders that stay empty are removed.

    Raises:
        UserError: it cannot be written, or another process is using it.
    """
    folder = Path(folder)
    check_folder(folder)
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder):
            yield
    finally:
        for each in new:
            with suppress(OSError):  # it is not empty
                each.rmdir()


def _probe(folder: Path, name: str = "") -> None:
    above = [folder, *folder.parents]
    created = [each for each in above if not os.path.exists(each)]  # Path.exists may raise
    if not os.path.isdir(above[len(created)]):
        raise UserError(f"{above[len(created)]}: cannot write here (it is a file, not a folder)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(prefix=f".{name}.", suffix=".partial", dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except (OSError, ValueError) as error:  # ValueError: characters that the system's file names cannot have
        raise UserError(f"{folder / name}: cannot write here ({reason(error)})") from None
    finally:
        for each in created:
            with suppress(OSError, ValueError):
                each.rmdir()


def _format(file: Path) -> str:
    """Pillow's name of a file's format. Raises: UserError if it writes none of this ending."""
    name = Image.registered_extensions().get(file.suffix.lower())
    if name is None or name not in Image.SAVE:
        ending = file.suffix or "a name without an ending"
        raise UserError(f"{file}: {ending} is not an image format; use .png, or a folder (its name ends with /)")
    return name


def _trial_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """The size itself; of large pictures one row and one column, which meet the same limits of a side."""
    return [(width, height)] if width * height <= _TRIAL_PIXELS else [(width, 1), (1, height)]


def _problem(name: str, size: tuple[int, int]) -> str | None:
    """Why a picture of this size cannot be saved in a format, by trying."""
    longest = _LONGEST_SIDE.get(name)
    if longest is not None and max(size) > longest:
        return f"its limit is {longest:,} pixels of a side"
    buffer = io.BytesIO()
    try:
        Image.new("RGB", size).save(buffer, name)
        if name not in Image.OPEN or name == "PDF":
            return None  # a format that Pillow only writes
        with Image.open(buffer) as read:
            return None if read.size == size else f"it has pictures of {read.width} x {read.height} pixels there"
    except _FORMAT_ERRORS as error:
        return reason(error)
