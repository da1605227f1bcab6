"""Progress on standard error: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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


def log_line(text: str) -> None:
    """One line to stderr, above the progress bar if there is one."""
    print(text, file=sys.stderr, flush=True)


class Display(Protocol):
    """Shows how far a training is; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Called after every step, with the losses of the latest."""
        ...


def display(name: str, done: int, steps: int, log_every: int) -> Display:
    """The display for stderr: a bar in a terminal, else plain lines that read well in a log."""
    console = Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        return ProgressBar(console, name, done, steps)
    return LogLines(name, done, steps, log_every)


class ProgressBar:
    def __init__(self, console: Console, name: str, done: int, steps: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[losses]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(name, total=steps, completed=done, rate="", losses="")
        self._rate = StepRate(done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        rate = self._rate(step)
        self._progress.update(self._task, completed=step, rate=f"{rate:.2f} it/s", losses=_text(losses))


class LogLines:
    """A line every 5 * log_every steps, or when 30 s have passed, and one for the last step."""

    def __init__(self, name: str, done: int, steps: int, log_every: int) -> None:
        self._name, self._steps, self._every = name, steps, 5 * log_every
        self._rate = StepRate(done)
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        rate = self._rate(step)
        now = time.monotonic()
        if step % self._every and step != self._steps and now - self._last < 30:
            return
        self._last = now
        left = _duration((self._steps - step) / rate) if rate else "?"
        log_line(f"{self._name}  step {step}/{self._steps}  {rate:.2f} it/s  {left} left  {_text(losses)}".rstrip())


class StepRate:
    """Steps a second over the last half minute or so, without the very first step (it warms caches up)."""

    def __init__(self, done: int) -> None:
        self._first = done + 1
        self._marks: list[tuple[float, int]] = []

    def __call__(self, step: int) -> float:
        now = time.monotonic()
        self._marks.append((now, step))
        while len(self._marks) > 20 and now - self._marks[1][0] > 30:
            self._marks.pop(0)
        (start, first) = self._marks[0]
        return (step - first) / (now - start) if now > start else 0.0


def _text(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:<7.4g}" for name, value in losses.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
