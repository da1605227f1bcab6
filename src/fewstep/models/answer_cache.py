"""Answers of language models on disk: what was once answered is not computed or paid for again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.atomic import write_text


class AnswerCache:
    """One JSON file for each answer, by a key in hexadecimal digits.

    Args:
        folder: is made with the first answer.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def read(self, key: str, field: str) -> Any:
        """A field of an answer; None where there is no answer, or a damaged one, which is then written anew."""
        try:
            return json.loads(self._file(key).read_text(encoding="utf-8"))[field]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: str, answer: dict[str, Any]) -> None:
        """Raises: UserError if the file cannot be written."""
        write_text(self._file(key), json.dumps(answer))

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
