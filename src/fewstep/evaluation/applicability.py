"""Which scores apply to which prompts, found before any image is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.rewards.protocol import Scorer

_CHUNK = 8  # prompts that are tried together; one that applies is enough, and a score may cost a request


def mean_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each score over the images that it applies to; a score that applies to none is left out."""
    return {key: float(values[~values.isnan()].mean()) for key, values in scores.items() if not values.isnan().all()}


def applicable_scores(scorer: Scorer, prompts: Sequence[str]) -> list[str]:
    """The scores of a scorer that apply to at least one of the prompts, from black images: whether a score applies
    depends on the prompt alone."""
    found: dict[str, None] = {}
    for start in range(0, len(prompts), _CHUNK):
        some = prompts[start : start + _CHUNK]
        scores = scorer.score(torch.zeros(len(some), 64, 64, 3, dtype=torch.uint8), some)
        found |= dict.fromkeys(mean_scores(scores))
        if len(found) == len(scores):
            break
    return list(found)


def check_applicable(opened: Mapping[str, Scorer], prompts: Sequence[str]) -> None:
    """Check scorers that a user named; one without any effect would be left out of the results silently.

    Raises:
        UserError: a scorer applies to none of the prompts.
    """
    for spec, scorer in opened.items():
        if not applicable_scores(scorer, prompts):
            raise UserError(f"scorer {spec}: it applies to none of the {len(prompts)} prompts; leave it out")
