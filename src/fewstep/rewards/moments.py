"""Running mean and deviation of a stream of scores, and the running share of those that failed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Sums a tensor over the processes that train together.
Reduce = Callable[[Tensor], Tensor]


class RunningMoments:
    """Mean and deviation of all values so far (Welford 1962, merged by batches as in Chan et al. 1979), in float64.

    Past ``window`` values the older ones lose weight: the scores of a model that learns drift.

    Args:
        window: the largest number of values that the past counts as.
        reduce: sums over processes, so that all have the moments of all values.
    """

    def __init__(self, window: int, reduce: Reduce) -> None:
        self.window, self.reduce = window, reduce
        self.count = self.mean = self.squares = 0.0

    def update(self, values: Tensor) -> None:
        """Adds values [N]; those that are not finite are left out. Values on the meta device are none."""
        if values.is_meta:
            return
        kept = values.detach().double()
        kept = kept[kept.isfinite()] - self.mean
        sums = self.reduce(torch.stack([kept.new_tensor(len(kept)), kept.sum(), kept.square().sum()]))
        added, first, second = sums.tolist()
        if not added:
            return
        self.count += added
        self.squares += second - first * first / self.count
        self.mean += first / self.count
        if self.count > self.window:
            self.squares *= self.window / self.count
            self.count = float(self.window)

    @property
    def deviation(self) -> float:
        """The standard deviation, 0 of fewer than two values."""
        return (max(0.0, self.squares) / self.count) ** 0.5 if self.count else 0.0

    def state(self) -> Tensor:
        """float64 [3]."""
        return torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restores what :meth:`state` returned."""
        self.count, self.mean, self.squares = state.double().tolist()


class FailureShare:
    """The share of failures among recent attempts.

    Args:
        window: the largest number of attempts that the past counts as.
        reduce: as for :class:`RunningMoments`.
    """

    def __init__(self, window: int, reduce: Reduce) -> None:
        self.window, self.reduce = window, reduce
        self.attempts = self.failures = 0.0
        self.total = 0  # failures so far

    def update(self, failed: Tensor) -> None:
        """Adds attempts: bool [N], true where one failed. Values on the meta device are none."""
        if failed.is_meta:
            return
        counts = torch.stack([torch.ones_like(failed).sum(), failed.sum()])
        attempts, failures = self.reduce(counts.double()).tolist()
        self.attempts, self.failures = self.attempts + attempts, self.failures + failures
        self.total += int(failures)
        if self.attempts > self.window:
            self.failures *= self.window / self.attempts
            self.attempts = float(self.window)

    @property
    def share(self) -> float:
        """In [0, 1]; 0 before the first attempt."""
        return self.failures / self.attempts if self.attempts else 0.0

    def state(self) -> Tensor:
        """float64 [3]."""
        return torch.tensor([self.attempts, self.failures, self.total], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restores what :meth:`state` returned."""
        self.attempts, self.failures, total = state.double().tolist()
        self.total = int(total)
