"""The share of votes that scores agree with, and its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a 95% interval


@dataclass(frozen=True)
class Agreement:
    """A share of votes, with its 95% confidence interval.

    Attributes:
        votes: with a winner; ties have none.
    """

    share: float
    low: float
    high: float
    votes: int

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.1f}% (95% interval {100 * self.low:.1f} to {100 * self.high:.1f}, {self.votes} votes)"
        )


def agreement(right: np.ndarray, groups: Sequence[str]) -> Agreement:
    """The share of true values.

    The interval is Wilson's (1927), of the effective number of votes: votes of one group, a prompt, are not
    independent, and count less by the design effect (Kish, Survey Sampling, 1965). Where all votes agree or none does,
    nothing is known of the design effect; then a group counts as one vote.

    Args:
        right: bool [V].
        groups: of each vote.

    Raises:
        ValueError: there are no votes.
    """
    if not len(right):
        raise ValueError("no votes")
    share, count = float(right.mean()), len(right)
    if share in (0.0, 1.0):
        effective = float(len(set(groups)))
    else:
        names, rows = np.unique(np.asarray(groups), return_inverse=True)
        residuals = np.bincount(rows, right - share, len(names))
        effective = count / max(1.0, float((residuals**2).sum()) / (count * share * (1 - share)))
    low, high = wilson(share, effective)
    return Agreement(share, low, high, count)


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% confidence interval of a share measured on ``count`` samples (Wilson, JASA 22, 1927)."""
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return max(0.0, center - half), min(1.0, center + half)
