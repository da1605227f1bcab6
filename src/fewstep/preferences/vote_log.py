"""The file of votes: records are appended and reach the disk one by one; nothing in it is rewritten."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Self

from fewstep.atomic import sync
from fewstep.data.preferences import Candidate, Choice, Undo, Vote, complete_lines, read_records, standing_votes
from fewstep.machine import writing
from fewstep.progress import log_line


class VoteLog:
    """``votes.jsonl``, open for appending. This process alone writes it.

    A last line that an interrupted write cut off is removed: it was never confirmed.

    Attributes:
        votes: those that stand, by their numbers, in their order.

    Raises:
        UserError: the file cannot be read or written, or a record is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        records = read_records(self.path)
        self.votes = {vote.vote: vote for vote in standing_votes(records)}
        self._next = 1 + max((record.vote for record in records if isinstance(record, Vote)), default=0)
        self._file: FileIO | None = None
        if self.path.exists():
            with writing(self.path):
                self._repair_end(self._open())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, prompt: str, left: Candidate, right: Candidate, choice: Choice, voter: str) -> Vote:
        """Record a vote; it is on the disk when this returns. Raises: UserError if it cannot be written."""
        vote = Vote(vote=self._next, prompt=prompt, left=left, right=right, choice=choice, voter=voter, time=_now())
        self._append(vote)
        self._next += 1
        self.votes[vote.vote] = vote
        return vote

    def undo(self, number: int, voter: str) -> None:
        """Record that a standing vote is undone. Raises: UserError if it cannot be written."""
        self._append(Undo(undo=number, voter=voter, time=_now()))
        del self.votes[number]

    def _open(self) -> FileIO:
        if self._file is None:
            new = not self.path.exists()
            self._file = FileIO(self.path, "a")
            if new:
                sync(self.path.parent)
        return self._file

    def _append(self, record: Vote | Undo) -> None:
        line = (json.dumps(record.model_dump(), ensure_ascii=False) + "\n").encode()
        with writing(self.path, "the vote is not recorded"):
            file = self._open()
            size = os.fstat(file.fileno()).st_size
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(size)  # no half of a line before the next record
                raise

    def _repair_end(self, file: FileIO) -> None:
        content = self.path.read_bytes()
        tail = content[content.rfind(b"\n") + 1 :]
        if not tail:
            return
        if tail in [line for _, line in complete_lines(content)]:
            file.write(b"\n")
            return
        log_line(f"{self.path}: its last line was cut off when it was written; it is no vote, and is removed")
        file.truncate(len(content) - len(tail))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
