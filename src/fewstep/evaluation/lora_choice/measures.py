"""Likeness, memorization and flexibility, from features and scores. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines [N, M] of features [N, D] and [M, D]."""
    return F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T


def likeness(features: Tensor, real: Tensor) -> float:
    """Mean cosine of images' features [N, D] with those of all training images [M, D]."""
    return float(_similarity(features, real).mean())


def likeness_within(real: Tensor) -> float:
    """Mean cosine of training images' features [M, D] with one another, M >= 2."""
    similarity, count = _similarity(real, real), len(real)
    return float((similarity.sum() - similarity.diagonal().sum()) / (count * (count - 1)))


def memorization(features: Tensor, real: Tensor) -> float:
    """Median cosine distance of images [N, D] to their nearest training image [M, D], over the median distance of a
    training image to its nearest other one. M >= 2; 1 where all training images are equal."""
    among = 1 - _similarity(real, real)
    among.fill_diagonal_(torch.inf)
    own = among.amin(1).median()
    nearest = (1 - _similarity(features, real)).amin(1).median()
    return float(nearest / own) if own > 1e-9 else 1.0


def relative_scores(scores: Mapping[str, float], without: Mapping[str, float]) -> float:
    """Scores over those without the LoRA, each at most 1, averaged. A loss is relative to a score's magnitude."""
    kept = [
        1.0 + min(0.0, (value - without[key]) / abs(without[key])) if without[key] else 1.0
        for key, value in scores.items()
    ]
    return sum(kept) / len(kept)


def prompts_recognized(features: Tensor, without: Tensor) -> float:
    """The share of images [N, D] that are nearer to the image without the LoRA of the same prompt and seed than to that
    of any other prompt [N, D]: prompt adherence where no scorer applies."""
    nearest = _similarity(features, without).argmax(1)
    return float((nearest == torch.arange(len(features))).double().mean())
