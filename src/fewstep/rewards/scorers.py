"""Scorers by name, with a checkpoint where they need one: "emoji", "clip_score:PATH_OR_ID"; rewards are scorers too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.registry import load_plugins, rewards, scorers
from fewstep.errors import UserError
from fewstep.rewards.guarded import Problem, guarded_scores
from fewstep.rewards.open import open_reward
from fewstep.rewards.protocol import Reward, Scorer
from fewstep.rewards.specs import needs_checkpoint, open_plugin

MICRO_BATCH = 16  # images that a reward scores at a time


class RewardScorer:
    """A reward as a scorer: one score, under the reward's name, NaN where it has none.

    Args:
        device: where the images are scored.
    """

    def __init__(self, reward: Reward, device: torch.device | str = "cpu") -> None:
        self.reward, self.name, self.device = reward, reward.name, device

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """images: uint8 [N, H, W, 3]. Raises: UserError if every image fails; the message is that of the first."""
        pixels = images.permute(0, 3, 1, 2)
        parts: list[Tensor] = []
        problems: dict[int, Problem] = {}
        for start in range(0, len(images), MICRO_BATCH):
            part = pixels[start : start + MICRO_BATCH].to(self.device).float() / 255
            scores, found = guarded_scores(self.reward, part, prompts[start : start + MICRO_BATCH], MICRO_BATCH)
            parts.append(scores.cpu())
            problems |= {start + row: problem for row, problem in found.items()}
        raised = [problem for problem in problems.values() if problem.raised]
        if raised and len(raised) == len(images):
            raise UserError(str(raised[0]))
        return {self.name: torch.cat(parts)}


def open_scorer(spec: str, device: torch.device | str = "cpu") -> Scorer:
    """The scorer of a name, or of "name:checkpoint"; or the reward of such a spec, where no scorer has its name.

    Raises:
        UserError: there is no such scorer, or its checkpoint is missing.
    """
    load_plugins()
    name = spec.partition(":")[0]
    if name in rewards and name not in scorers:
        return RewardScorer(open_reward(spec, device), device)
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
