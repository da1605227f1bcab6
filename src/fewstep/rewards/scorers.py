"""Scorers by name, with a checkpoint where they need one: "emoji", "clip_score:PATH_OR_ID"."""

from __future__ import annotations

import torch

from fewstep.core.registry import load_plugins, scorers
from fewstep.errors import UserError
from fewstep.rewards.protocol import Scorer

#: Scorers that need a checkpoint, and are only used where they are named.
NEED_CHECKPOINT = {"clip_score"}


def open_scorer(spec: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer of a name, or of "name:checkpoint".

    Raises:
        UserError: there is no such scorer, or its checkpoint is missing.
    """
    load_plugins()
    name, _, checkpoint = spec.partition(":")
    make = scorers.get(name)
    if name in NEED_CHECKPOINT:
        if not checkpoint:
            raise UserError(f"scorer {name}: give a checkpoint, as in {name}:PATH_OR_HUB_ID")
        return make(checkpoint, device)  # type: ignore[no-any-return]
    return make(checkpoint) if checkpoint else make()  # type: ignore[no-any-return]


def default_scorers() -> list[Scorer]:
    """Every registered scorer that needs no checkpoint; those that apply to none of the prompts are left out of
    reports."""
    load_plugins()
    return [open_scorer(name) for name in scorers.names() if name not in NEED_CHECKPOINT]
