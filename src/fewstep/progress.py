"""Progress on standard error: bars with rate and time left in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

#: Called with how many items are done since the last call.
Advance = Callable[[int], None]

LINE_SECONDS = 30  # between lines in a log


class ProgressBars:
    """A context manager that shows one or more bars; in a log, a line per bar every 30 seconds.

    >>> with ProgressBars() as bars:
    ...     advance = bars.add("encoding images", 2)
    ...     advance(1)
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def add(self, description: str, total: int | None = None) -> Advance:
        """A further bar for ``total`` items, or for a number that is not known before the end."""
        task = self._progress.add_task(description, total=total, rate="")
        rate, done, last = StepRate(), 0, monotonic()
        rate(0)

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            text = f"{rate(done):,.1f}/s"
            self._progress.update(task, completed=done, rate=text)
            if not self._terminal and monotonic() - last >= LINE_SECONDS:
                last = monotonic()
                log_line(f"{description}  {done:,}{'' if total is None else f'/{total:,}'}  {text}")

        return advance


@contextmanager
def progress_bar(total: int | None, description: str) -> Iterator[Advance]:
    """One bar; yields the function to call with the number of items done since its last call."""
    with ProgressBars() as bars:
        yield bars.add(description, total)


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The items one by one, with a bar."""
    with progress_bar(len(items), description) as advance:
        for item in items:
            yield item
            advance(1)


def log_line(text: str) -> None:
    """One line on standard error, above the progress bar if there is one."""
    print(text, file=sys.stderr, flush=True)


class TrainingDisplay(Protocol):
    """Shows the progress of a training; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Called after every step, with its losses."""
        ...


def training_display(name: str, done: int, steps: int, log_every: int, meanings: Mapping[str, str]) -> TrainingDisplay:
    """A bar in a terminal, else plain lines, after a line for each loss that has a meaning (by the loss's name).

    ``done`` steps of ``steps`` were taken earlier.
    """
    console = Console(stderr=True)
    notes = [f"loss {loss}: {meaning}" for loss, meaning in meanings.items() if meaning]
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        return TrainingBar(console, name, done, steps, notes)
    return TrainingLines(name, done, steps, log_every, notes)


class TrainingBar:
    """A bar with rate, time left and losses, in a terminal."""

    def __init__(self, console: Console, name: str, done: int, steps: int, notes: Sequence[str]) -> None:
        self._notes = notes
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
        self._rate = StepRate()

    def __enter__(self) -> Self:
        for note in self._notes:
            log_line(note)
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        rate = self._rate(step)
        self._progress.update(self._task, completed=step, rate=f"{rate:.2f} it/s", losses=_format_losses(losses))


class TrainingLines:
    """A line every 5 * ``log_every`` steps, or when 30 s have passed, and one for the last step."""

    def __init__(self, name: str, done: int, steps: int, log_every: int, notes: Sequence[str]) -> None:
        self._notes = notes
        self._name, self._steps, self._every = name, steps, 5 * log_every
        self._rate = StepRate()
        self._last = monotonic()

    def __enter__(self) -> Self:
        for note in self._notes:
            log_line(note)
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        rate = self._rate(step)
        now = monotonic()
        if step % self._every and step != self._steps and now - self._last < LINE_SECONDS:
            return
        self._last = now
        left = _format_duration((self._steps - step) / rate) if rate else "?"
        counts = f"step {step}/{self._steps}  {rate:.2f} it/s  {left} left"
        log_line(f"{self._name}  {counts}  {_format_losses(losses)}".rstrip())


class StepRate:
    """Steps per second over the last half minute, without the first step, which warms caches up."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def __call__(self, step: int) -> float:
        now = monotonic()
        self._marks.append((now, step))
        while len(self._marks) > 20 and now - self._marks[1][0] > 30:
            self._marks.pop(0)
        start, first = self._marks[0]
        return (step - first) / (now - start) if now > start else 0.0


def _format_losses(losses: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:<7.4g}" for name, value in losses.items())


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
