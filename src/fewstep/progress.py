"""A progress bar over anything that may take more than two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


@contextmanager
def counter(text: str) -> Iterator[Callable[[int], None]]:
    """What it gives is told how far things are, where nobody knows how many there will be: shows count, rate, time."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description} {task.completed:,}"), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task, began = progress.add_task(text, total=None, rate=""), monotonic()

        def show(count: int) -> None:
            progress.update(task, completed=count, rate=f"{count / max(monotonic() - began, 1e-3):,.0f}/s")

        yield show


def track(items: Sequence[Item], text: str) -> Iterator[Item]:
    """The items one by one, with a bar on a terminal's standard error: count, time, time left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(items, description=text)
