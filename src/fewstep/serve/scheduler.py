"""One thread that draws, from one bounded queue."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic
from typing import Protocol

from fewstep.serve.fair_queue import FairQueue
from fewstep.serve.jobs import Job, Request


class QueueFull(Exception):
    """``retry_after``: seconds after which there should be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Draws(Protocol):
    """What computes batches: :class:`fewstep.serve.drawing.DrawingEngine`."""

    def batch_limit(self, job: Job) -> int: ...

    def draw(self, jobs: Sequence[Job]) -> None: ...


class Scheduler:
    """Requests wait in a fair queue; batches of one shape are drawn in a thread, one at a time.

    Args:
        max_queue: images that wait; more are refused.
    """

    def __init__(self, engine: Draws, max_queue: int) -> None:
        self.engine, self.max_queue = engine, max_queue
        self._queue: FairQueue[Job] = FairQueue()
        self._drawing: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._rate = 0.0  # cost per second, of recent batches; 0 is unknown
        self._thread = threading.Thread(target=self._run, name="fewstep draw", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it draws, and takes requests."""
        return self._thread.is_alive() and not self._stopping

    @property
    def queued(self) -> int:
        """Images that wait."""
        return len(self._queue)

    def submit(self, request: Request) -> None:
        """Raises: QueueFull."""
        with self._changed:
            if self._stopping:
                raise QueueFull(1.0)
            if len(self._queue) + len(request.seeds) > self.max_queue:
                raise QueueFull(self._seconds(self._queue.items()))
            for index in range(len(request.seeds)):
                self._queue.add(Job(request, index), request.client, request.shape)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Nobody waits for the request any more: what waits is dropped, what is drawn stops at its next step unless
        others share the batch."""
        with self._changed:
            request.cancelled = True
            self._queue.remove(lambda job: job.request is request)

    def position(self, request: Request) -> tuple[int, float]:
        """How many images of earlier requests are drawn or wait, and the seconds until this request should be done;
        0 seconds before the first batch has told the speed."""
        with self._changed:
            pending = [*self._drawing, *self._queue.items()]
            ahead = [job for job in pending if job.request.number < request.number]
            own = [job for job in pending if job.request is request]
            return len(ahead), self._seconds([*ahead, *own])

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests; return when those that were taken are drawn, or after ``timeout`` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _seconds(self, jobs: Sequence[Job]) -> float:
        return sum(job.request.cost for job in jobs) / self._rate if self._rate else 0.0

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            start = monotonic()
            self.engine.draw(batch)
            with self._changed:
                self._drawing = []
            if not any(job.request.cancelled for job in batch):
                rate = sum(job.request.cost for job in batch) / (monotonic() - start)
                self._rate = 0.7 * self._rate + 0.3 * rate if self._rate else rate

    def _next(self) -> list[Job] | None:
        """The next batch; None when it is stopping and nothing is left."""
        with self._changed:
            while not len(self._queue):
                if self._stopping:
                    return None
                self._changed.wait()
            self._drawing = self._queue.take(self.engine.batch_limit, lambda job: job.request.cost)
            return self._drawing
