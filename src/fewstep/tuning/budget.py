"""Rungs and clocks of a search: how long trials train, and when they are compared (successive halving, arXiv
1810.05934)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fewstep.training.trainer import Trainer

REDUCTION = 3  # of the trials at a rung, one in so many reaches the next, which is so many times as long
TIMED_SHARES = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of a training, where its steps are timed
TIMED_STEPS = 2  # at each


def rung_shares(rungs: int) -> list[float]:
    """The shares of a whole trial after which it is measured, ascending to 1."""
    return [float(REDUCTION) ** -power for power in reversed(range(rungs))]


def rung_steps(steps: int, rungs: int) -> list[int]:
    """The steps after which a trial of ``steps`` steps is measured, ascending to ``steps``."""
    return [math.ceil(steps * share - 1e-9) for share in rung_shares(rungs)]


def expected_trials(search_minutes: float, trial_minutes: float, rungs: int) -> int:
    """About how many trials fit into a search if one in ``REDUCTION`` passes each rung; building and measuring models
    takes no time in this figure."""
    return math.floor(search_minutes / (trial_minutes * mean_length(rungs)) + 1e-9)


def mean_length(rungs: int) -> float:
    """The length of a trial in whole ones, on average, if one in ``REDUCTION`` passes each rung."""
    shares = rung_shares(rungs)
    parts = [share - before for share, before in zip(shares, [0.0, *shares[:-1]], strict=True)]
    return sum(part / REDUCTION**rung for rung, part in enumerate(parts))


def steps_within(minutes: float, seconds_per_step: float) -> int:
    """The steps that fit into these minutes, at least one."""
    return max(1, math.floor(60 * minutes / seconds_per_step + 1e-9))


def seconds_per_step(trainer: Trainer, steps: int) -> float:
    """The mean time of a step of a training of ``steps`` steps: of a few of each quarter, as weights and
    parts may start later; each after one that warms up. The trainer has changed weights then; discard it.

    On a CPU it is the time that this thread computes: what else runs on the machine does not make a trial shorter.
    """
    now = time.thread_time if trainer.dist.device.type == "cpu" else time.monotonic
    times = []
    for share in TIMED_SHARES:
        trainer.step = math.floor(steps * share)
        trainer.take_step()
        for _ in range(TIMED_STEPS):
            start = now()
            trainer.take_step()
            times.append(now() - start)
    return max(statistics.mean(times), 1e-6)


@dataclass
class Clock:
    """The time of a search over all its sessions, without what its trials share.

    Attributes:
        limit: seconds of the whole search.
        earlier: seconds of earlier sessions.
    """

    limit: float
    earlier: float = 0.0
    _start: float = field(default_factory=time.monotonic)

    @property
    def used(self) -> float:
        return self.earlier + time.monotonic() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside is not of the search."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._start += time.monotonic() - began

    @property
    def left(self) -> float:
        return self.limit - self.used
