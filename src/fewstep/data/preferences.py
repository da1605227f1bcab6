"""Votes between two images of one prompt, and the preference pairs that follow from them.

A folder of votes holds

    votes.jsonl   one record for each line, appended and never rewritten: a vote, or the undoing of an earlier one
    images/       the images that were compared; records name them by paths relative to the folder

A vote: ``{"vote": 7, "prompt": "...", "left": {"model": "a", "image": "images/a/0003.png"}, "right": {...},
"choice": "left", "voter": "human", "time": "2026-11-28T05:00:00+00:00"}``; an undoing: ``{"undo": 7, ...}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from fewstep.config.base import PlainValues
from fewstep.config.explain import explain
from fewstep.errors import UserError
from fewstep.machine import reading

VOTES = "votes.jsonl"

Choice = Literal["left", "right", "tie"]


class _Record(PlainValues):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Candidate(_Record):
    """One of two images.

    Attributes:
        model: the name of what made it.
        image: its file, relative to the folder of the votes.
    """

    model: str
    image: str


class Vote(_Record):
    """A choice between two images of one prompt.

    Attributes:
        vote: its number, from 1, by which it can be undone.
        left, right: as they were shown.
        voter: who or what chose.
        time: in ISO 8601; empty if it is not known.
    """

    vote: int = Field(ge=1)
    prompt: str
    left: Candidate
    right: Candidate
    choice: Choice
    voter: str = "human"
    time: str = ""


class Undo(_Record):
    """The undoing of the vote with the number ``undo``."""

    undo: int = Field(ge=1)
    voter: str = "human"
    time: str = ""


@dataclass(frozen=True)
class PreferencePair:
    """Two images of a prompt, of which one was preferred."""

    prompt: str
    winner: Path
    loser: Path


def read_records(path: Path) -> list[Vote | Undo]:
    """All records of a file of votes, in their order; none if there is no such file.

    A last line that an interrupted write cut off is left out: nobody was told that it was recorded.

    Raises:
        UserError: the file cannot be read, or a record is wrong; the message has the number of its line.
    """
    if not path.exists():
        return []
    with reading(path):
        content = path.read_bytes()
    records: list[Vote | Undo] = []
    standing: set[int] = set()
    numbers: set[int] = set()
    for number, line in complete_lines(content):
        record = _parse(line, f"{path}, line {number}")
        if isinstance(record, Vote):
            if record.vote in numbers:
                raise UserError(f"{path}, line {number}: a second vote {record.vote}; delete one of them")
            numbers.add(record.vote)
            standing.add(record.vote)
        elif record.undo not in standing:
            raise UserError(f"{path}, line {number}: undo {record.undo}: no vote before it has this number")
        else:
            standing.remove(record.undo)
        records.append(record)
    return records


def complete_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of records that are not blank, with their numbers, without a last one that was cut off."""
    lines = content.split(b"\n")
    if not _is_json(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


def standing_votes(records: list[Vote | Undo]) -> list[Vote]:
    """The votes that were not undone, in their order."""
    undone = {record.undo for record in records if isinstance(record, Undo)}
    return [record for record in records if isinstance(record, Vote) and record.vote not in undone]


def read_votes(source: str | Path, voter: str | None = None) -> list[Vote]:
    """The votes of a folder, or of its ``votes.jsonl``, that were not undone.

    Args:
        voter: only this one's; None is all voters.

    Raises:
        UserError: there are none, or a record is wrong.
    """
    path = votes_file(source)
    if not path.is_file():
        raise UserError(f"{path}: no such file; votes come from fewstep prefs collect")
    votes = standing_votes(read_records(path))
    chosen = [vote for vote in votes if voter is None or vote.voter == voter]
    if not chosen:
        voters = ", ".join(dict.fromkeys(vote.voter for vote in votes))
        problem = f"no votes of {voter}; there are votes of: {voters}" if voters else "no votes in it"
        raise UserError(f"{path}: {problem}")
    return chosen


def preference_pairs(source: str | Path, voter: str | None = None) -> list[PreferencePair]:
    """The winners and losers of the votes in a folder, in their order; ties are left out.

    Args:
        source: a folder with ``votes.jsonl`` in it, or the file itself, whose folder the images are relative to.
        voter: only this one's votes; None is all voters.

    Raises:
        UserError: there are no votes with a winner, a record is wrong, or an image is missing.
    """
    path, pairs = votes_file(source), []
    for vote in read_votes(source, voter):
        if vote.choice == "tie":
            continue
        left, right = path.parent / vote.left.image, path.parent / vote.right.image
        for image in (left, right):
            if not image.is_file():
                raise UserError(f"{path}, vote {vote.vote}: its image {image} is missing")
        winner, loser = (left, right) if vote.choice == "left" else (right, left)
        pairs.append(PreferencePair(vote.prompt, winner, loser))
    if not pairs:
        raise UserError(f"{path}: all votes are ties; preference pairs need votes with a winner")
    return pairs


def votes_file(source: str | Path) -> Path:
    """``votes.jsonl`` of a folder; the file itself where ``source`` is one."""
    path = Path(source)
    return path / VOTES if path.is_dir() or path.suffix != ".jsonl" else path


def _parse(line: bytes, where: str) -> Vote | Undo:
    try:
        tree: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); delete the line") from None
    if not isinstance(tree, dict) or not ("vote" in tree) ^ ("undo" in tree):
        raise UserError(f"{where}: expected an object with the key vote or undo; delete the line")
    kind: type[Vote] | type[Undo] = Vote if "vote" in tree else Undo
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, tree, kind)}; correct it, or delete the line") from None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
