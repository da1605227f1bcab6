"""The captions of a folder of images: text files beside them, or Hugging Face's ``metadata.csv`` and ``.jsonl``."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import UserError
from fewstep.machine import reading

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")

_SHOTS = {
    "close-up": r"close[- ]?up|head ?shot|portrait|face (?:photo|shot)|headshot",
    "medium": r"medium[- ]shot|half[- ]body|upper[- ]body|waist[- ]up|cowboy shot|from the waist",
    "full-body": r"full[- ](?:body|length)|head to toe|whole body|wide shot|long shot",
}


@dataclass(frozen=True)
class CaptionRule:
    """How captions are made.

    Attributes:
        name: of the subject; "" is none.
        template: of images without a caption; {name} stands for the name.
        trigger: put before captions that lack it; "" is none.
    """

    name: str = ""
    template: str = "a photo of {name}"
    trigger: str = ""

    def __post_init__(self) -> None:
        try:
            made = self.template.format(name=self.name)
        except (KeyError, IndexError, ValueError):
            raise UserError(f"--template {self.template!r}: only {{name}} may be in braces") from None
        if self.name and self.name not in made:
            raise UserError(f"--template {self.template!r}: has no {{name}}; without it every caption would lack it")

    def caption(self, own: str) -> str:
        """The caption of an image whose user wrote ``own``, "" if nothing. The user's words are kept: the template is
        put before them unless they have the name."""
        words = own
        if self.name and self.name.casefold() not in own.casefold():
            made = self.template.format(name=self.name)
            words = f"{made}, {own}" if own else made
        if self.trigger and self.trigger.casefold() not in words.casefold():
            return f"{self.trigger}, {words}" if words else self.trigger
        return words


def read_captions(folder: Path) -> dict[Path, str]:
    """The captions in the metadata files of a folder and of those in it, by the image's path.

    Raises:
        UserError: a file cannot be read, or has no column of file names or captions.
    """
    found: dict[Path, str] = {}
    for name in METADATA:
        for file in sorted(folder.rglob(name)):
            rows = _jsonl(file) if file.suffix == ".jsonl" else _csv(file)
            for where, row in rows:
                image = row.get("file_name")
                column = next((key for key in COLUMNS if key in row), None)
                if not isinstance(image, str) or column is None:
                    raise UserError(f"{where}: expected file_name and one of {', '.join(COLUMNS)}; it has {_keys(row)}")
                found[file.parent / image] = clean(str(row[column] or ""))
    return found


def caption_beside(image: Path) -> str | None:
    """The text file beside an image; None if there is none. Raises: UserError if it is no UTF-8 text."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        return None
    try:
        with reading(file):
            return clean(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a UTF-8 text file; save it as UTF-8") from None


def clean(text: str) -> str:
    """On one line, with single spaces."""
    return " ".join(text.split())


def shot(caption: str) -> str | None:
    """The kind of shot that a caption names: "close-up", "medium" or "full-body"; None if it names none."""
    return next((kind for kind, words in _SHOTS.items() if re.search(words, caption, re.IGNORECASE)), None)


def _jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}: line {number}: expected an object with file_name and text")
        yield f"{file}: line {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number, row in enumerate(csv.DictReader(_lines(file)), 2):
        yield f"{file}: line {number}", row


def _lines(file: Path) -> Iterator[str]:
    try:
        with reading(file), file.open(encoding="utf-8-sig", newline="") as stream:
            yield from stream
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a UTF-8 text file; save it as UTF-8") from None


def _keys(row: Mapping[str, object]) -> str:
    return ", ".join(str(key) for key in row) or "nothing"
