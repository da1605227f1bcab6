"""Scorers by name, with a checkpoint where they need one: "emoji", "clip_score:PATH_OR_ID"."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.core.registry import load_plugins, scorers
from fewstep.rewards.protocol import Scorer
from fewstep.rewards.specs import needs_checkpoint, open_plugin


def open_scorer(spec: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer of a name, or of "name:checkpoint".

    Raises:
        UserError: there is no such scorer, or its checkpoint is missing.
    """
    scorer: Scorer = open_plugin(scorers, spec, device)
    return scorer


def open_scorers(specs: Sequence[str | Scorer] | None = None, device: torch.device | str = "cpu") -> dict[str, Scorer]:
    """Scorers by their specs, in order; scorers that are given as objects by their names.

    Args:
        specs: None is every registered scorer that needs no checkpoint. A score that applies to none of the prompts of
            an evaluation is left out of its results.

    Raises:
        UserError: as for :func:`open_scorer`.
    """
    if specs is None:
        load_plugins()
        specs = [name for name in scorers.names() if not needs_checkpoint(scorers.get(name))]
    return {
        (spec if isinstance(spec, str) else spec.name): open_scorer(spec, device) if isinstance(spec, str) else spec
        for spec in specs
    }
