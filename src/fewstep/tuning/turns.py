"""Turns of processes that share a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.errors import UserError
from fewstep.locks import lock

_POLL = 0.2  # seconds


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with this path; waits for those that are."""
    while True:
        try:
            unlock = lock(path)
        except UserError:
            time.sleep(_POLL)
            continue
        break
    try:
        yield
    finally:
        unlock()
