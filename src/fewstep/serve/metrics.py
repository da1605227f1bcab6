"""What the server measures, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one server.

    Args:
        queued: number of images that wait.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, queued: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._phase = Histogram(
            "fewstep_request_seconds",
            "Latency of requests by phase: queue, draw, encode.",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch = Histogram(
            "fewstep_batch_images", "Images drawn together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self._batch_seconds = Histogram(
            "fewstep_batch_seconds", "Seconds of a batch.", buckets=_SECONDS, registry=self.registry
        )
        self._images = Counter("fewstep_images", "Images drawn.", registry=self.registry)
        self._answers = Counter("fewstep_answers", "Answers by status.", ["status"], registry=self.registry)
        self._errors = Counter("fewstep_errors", "Requests that failed, by kind.", ["kind"], registry=self.registry)
        Gauge("fewstep_queue_images", "Images that wait.", registry=self.registry).set_function(queued)

    def batch(self, images: int, seconds: float) -> None:
        self._batch.observe(images)
        self._batch_seconds.observe(seconds)
        self._images.inc(images)

    def phase(self, name: str, seconds: float) -> None:
        self._phase.labels(name).observe(seconds)

    def answer(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def dump(self) -> bytes:
        return generate_latest(self.registry)
