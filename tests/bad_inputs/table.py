"""What a row of the table of bad inputs is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: A text file, a file of bytes, or a function that makes the path.
Content = str | bytes | Callable[[Path], object]

_VARYING = re.compile(r"\{(\w+|\.\.\.)\}")
_COMMAND = re.compile(r"emoji [\w-]+|[\w-]+")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        command: what is typed after ``fewstep``, in a folder that holds the model ``tiny`` and ``files``.
        expected: part of the message, with the file, key or value that is wrong.
        files: contents by name.
    """

    command: str
    expected: str
    files: Mapping[str, Content] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)

    @property
    def command_name(self) -> str:
        """ "generate", "emoji build", ..."""
        found = _COMMAND.match(self.command)
        assert found is not None
        return found.group()


@dataclass(frozen=True, init=False)
class Message:
    """An error message, and the inputs that give it.

    Attributes:
        text: the message without "error: "; what varies is in braces, as in "{file}: not a UTF-8 text file"; "{...}" is
            what may follow.
        advice: what it means where that is not plain, and what to do.
    """

    text: str
    advice: str
    cases: tuple[Case, ...]

    def __init__(self, text: str, advice: str, *cases: Case) -> None:
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "advice", advice)
        object.__setattr__(self, "cases", cases)

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole message."""
        parts = _VARYING.split(self.text)
        return re.compile("".join(".*" if index % 2 else re.escape(part) for index, part in enumerate(parts)))

    @property
    def shown(self) -> str:
        """The text with capitals for what varies."""
        return _VARYING.sub(lambda name: name.group(1).upper(), self.text)

    @property
    def commands(self) -> list[str]:
        """The commands of the cases, in order of appearance."""
        return list(dict.fromkeys(case.command_name for case in self.cases))


@dataclass(frozen=True)
class Section:
    """A heading of the page of errors.

    Attributes:
        note: a paragraph below the heading.
    """

    title: str
    note: str
    messages: tuple[Message, ...]
