"""How many steps a prompt needs, by scores of images at several numbers of steps; and what a choice of numbers gives.
Pure functions on scores [N, K, S]: of N prompts, at K ascending counts, from S seeds that are the same at all counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seed_noise(scores: Tensor) -> float:
    """The standard deviation over seeds of a prompt's score at the most steps, pooled over prompts, of a mean over the
    S seeds."""
    if scores.shape[2] < 2:
        raise ValueError("seed noise needs at least two seeds")
    return float((scores[:, -1].var(dim=1).mean() / scores.shape[2]).sqrt())


def step_labels(scores: Tensor, noise: float) -> Tensor:
    """The index of the least count from which on the mean score is within ``noise`` of that at the most steps: [N]."""
    means = scores.mean(dim=2)
    enough = means >= means[:, -1:] - noise
    from_here = enough.flip(1).cummin(dim=1).values.flip(1)
    return from_here.long().argmax(dim=1)


def quality(scores: Tensor, indices: Tensor) -> float:
    """The mean score when prompt i has count ``indices[i]``."""
    return float(scores.mean(dim=2).gather(1, indices[:, None]).mean())


def mean_steps(counts: Sequence[int], indices: Tensor) -> float:
    """The mean number of steps of such a choice."""
    return float(torch.tensor(counts, dtype=torch.float)[indices].mean())


def fixed_quality(scores: Tensor, counts: Sequence[int], steps: float) -> float:
    """The mean score at ``steps`` mean steps when all prompts are treated alike: between two counts a random share of
    the prompts has the larger one.

    Args:
        steps: from the least to the most of ``counts``.
    """
    means = scores.mean(dim=(0, 2))
    upper = next(index for index, count in enumerate(counts) if count >= steps)
    if counts[upper] == steps:
        return float(means[upper])
    share = (steps - counts[upper - 1]) / (counts[upper] - counts[upper - 1])
    return float((1 - share) * means[upper - 1] + share * means[upper])


def shuffled_quality(scores: Tensor, indices: Tensor) -> float:
    """The expected mean score when the same counts are given to the prompts at random."""
    shares = torch.bincount(indices, minlength=scores.shape[1]).double() / len(indices)
    return float((scores.mean(dim=(0, 2)).double() * shares).sum())
