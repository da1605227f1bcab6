"""A voter's way through the comparisons: the next pair, votes, undoing. Nothing that it shows names a model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from fewstep.data.preferences import Candidate, Choice, Vote
from fewstep.preferences.pool import candidates
from fewstep.preferences.schedule import Comparison
from fewstep.preferences.vote_log import VoteLog

_Key = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class _Shown:
    """What is shown: random names stand for the pair and its images."""

    key: _Key
    token: str
    images: dict[str, Path]


class VotingSession:
    """The comparisons that a voter has not voted on, in order, and the votes on them; safe for several threads.

    Args:
        log: where votes are recorded.
        comparisons: in the order in which they are shown.
        prompts: by number.
        voter: recorded with each vote; votes of others on the same comparisons do not count here.
    """

    def __init__(self, log: VoteLog, comparisons: Sequence[Comparison], prompts: Sequence[str], voter: str) -> None:
        self.log, self.voter, self.folder = log, voter, log.path.parent
        pairs = [(prompts[each.prompt], *candidates(each)) for each in comparisons]
        self._pairs: dict[_Key, tuple[str, Candidate, Candidate]] = {_key(*pair): pair for pair in pairs}
        voted = {_key(vote.prompt, vote.left, vote.right): vote for vote in self._own_votes()}
        self._voted = {key: vote.vote for key, vote in voted.items() if key in self._pairs}
        self._lock = RLock()
        self._shown: _Shown | None = None

    @property
    def total(self) -> int:
        return len(self._pairs)

    @property
    def done(self) -> int:
        return len(self._voted)

    def pending(self) -> list[tuple[str, Candidate, Candidate]]:
        """Prompt, left and right image of the comparisons without a vote of this voter, in order."""
        return [pair for key, pair in self._pairs.items() if key not in self._voted]

    def record(self, prompt: str, left: Candidate, right: Candidate, choice: Choice) -> None:
        """Record a vote on one of the comparisons. Raises: UserError if it cannot be written."""
        vote = self.log.add(prompt, left, right, choice, self.voter)
        self._voted[_key(prompt, left, right)] = vote.vote

    def state(self) -> dict[str, Any]:
        """What the page shows: the pair's token (None at the end), its prompt and the names of its two images, and the
        progress."""
        with self._lock:
            pair = self._current()
            shown = None if pair is None else self._show(pair)
            return {
                "pair": shown and shown.token,
                "prompt": "" if pair is None else pair[0],
                "images": [] if shown is None else list(shown.images),
                "done": self.done,
                "total": self.total,
                "can_undo": bool(self._voted),
            }

    def vote(self, token: str, choice: Choice) -> bool:
        """Record a choice for the pair that is shown; False if another one is shown by now. Errors as for
        :meth:`record`."""
        with self._lock:
            if self._shown is None or token != self._shown.token:
                return False
            self.record(*self._pairs[self._shown.key], choice)
            self._shown = None
            return True

    def undo(self) -> bool:
        """Undo the voter's last vote on these comparisons, whose pair is shown again; False if there is none. Raises:
        UserError if it cannot be recorded."""
        with self._lock:
            if not self._voted:
                return False
            key, number = max(self._voted.items(), key=lambda each: each[1])
            self.log.undo(number, self.voter)
            del self._voted[key]
            self._shown = None
            return True

    def image(self, name: str) -> Path | None:
        """The file of an image that is shown, by the name that stands for it."""
        with self._lock:
            return None if self._shown is None else self._shown.images.get(name)

    def _own_votes(self) -> list[Vote]:
        return [vote for vote in self.log.votes.values() if vote.voter == self.voter]

    def _current(self) -> tuple[str, Candidate, Candidate] | None:
        return next((pair for key, pair in self._pairs.items() if key not in self._voted), None)

    def _show(self, pair: tuple[str, Candidate, Candidate]) -> _Shown:
        key, sides = _key(*pair), pair[1:]
        if self._shown is None or self._shown.key != key:
            # names are drawn anew each time: the same image in another pair cannot be recognized by its name
            images = {secrets.token_urlsafe(12): self.folder / side.image for side in sides}
            self._shown = _Shown(key, secrets.token_urlsafe(12), images)
        return self._shown


def _key(prompt: str, left: Candidate, right: Candidate) -> _Key:
    return prompt, frozenset((left.image, right.image))
