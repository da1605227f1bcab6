"""Values that change over the steps of a training: constant, linear, cosine, piecewise constant."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """``schedule(step) -> value``; ``step`` counts finished steps, so the first step of a training is 0."""

    def __call__(self, step: int) -> float: ...

    @property
    def breakpoints(self) -> list[int]:
        """Steps at which the value may change its form, ascending, 0 included."""
        ...


@dataclass(frozen=True)
class Constant:
    """One value for all steps."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def breakpoints(self) -> list[int]:
        return [0]


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``end`` between two steps, linear or a half cosine; constant before and after."""

    start: float
    end: float
    first_step: int
    last_step: int
    cosine: bool = False

    def __call__(self, step: int) -> float:
        if step >= self.last_step:
            return self.end
        progress = max(0.0, (step - self.first_step) / (self.last_step - self.first_step))
        if self.cosine:
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress

    @property
    def breakpoints(self) -> list[int]:
        return sorted({0, self.first_step, self.first_step + 1, self.last_step})


@dataclass(frozen=True)
class Piecewise:
    """``values[step]`` from each of these steps on; the first must be 0."""

    values: Mapping[int, float]

    def __call__(self, step: int) -> float:
        starts = self.breakpoints
        return self.values[starts[bisect_right(starts, step) - 1]]

    @property
    def breakpoints(self) -> list[int]:
        return sorted(self.values)
