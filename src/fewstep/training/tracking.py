"""The metrics of a run: one JSON object per line, TensorBoard, and the trackers that the recipe names."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.atomic import write_text
from fewstep.machine import reading, writing
from fewstep.training.trackers import ExperimentTracker


class RunningMeans:
    """Means of metrics since the last `take`."""

    def __init__(self, state: Mapping[str, tuple[float, int]] | None = None) -> None:
        self._sums: dict[str, tuple[float, int]] = {key: (total, n) for key, (total, n) in (state or {}).items()}

    def add(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            total, n = self._sums.get(key, (0.0, 0))
            self._sums[key] = (total + value, n + 1)

    def take(self) -> dict[str, float]:
        means = {key: total / n for key, (total, n) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        return dict(self._sums)


class Tracker:
    """Appends to metrics.jsonl and to TensorBoard events in `directory`.

    `step` is the step that the run resumes from: later lines are dropped, since those steps are taken again. `further`
    trackers get the same metrics and images, and are closed with this one.
    """

    def __init__(self, directory: Path, step: int, further: Sequence[ExperimentTracker] = ()) -> None:
        # Imported here: it takes a second, and commands that only read a run do not need it.
        from torch.utils.tensorboard import SummaryWriter

        self._further = further
        self._path, self._events = directory / "metrics.jsonl", directory / "events.out.tfevents"
        _truncate(self._path, step)
        with writing(self._path):
            self._lines = self._path.open("a", encoding="utf-8")
        with writing(self._events):
            self._board = SummaryWriter(str(directory), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics; values that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing(self._path):
            self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            self._lines.flush()
        with writing(self._events):
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]
        for tracker in self._further:
            tracker.log(step, metrics)

    def image(self, step: int, image: Image.Image) -> None:
        pixels = np.asarray(image.convert("RGB"))
        with writing(self._events):
            self._board.add_image("preview", pixels, step, dataformats="HWC")  # type: ignore[no-untyped-call]
        for tracker in self._further:
            tracker.image(step, image)

    def close(self) -> None:
        for tracker in self._further:
            tracker.close()
        with writing(self._path):
            self._lines.close()
        with writing(self._events):
            self._board.close()  # type: ignore[no-untyped-call]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an incomplete last line is left out."""
    lines: list[dict[str, Any]] = []
    with reading(path):
        written = path.read_text(encoding="utf-8", errors="replace")
    for text in written.splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
