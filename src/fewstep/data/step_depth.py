"""Which prompts are trained at which number of steps: those that need many get more of the deep rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.seeds import generator

#: Weight, among the prompts of a batch, of one that needs fewer steps than the batch has. The number is ours: such
#: prompts still get some, for those who sample them with more steps than they need.
EASY_WEIGHT = 0.25


@dataclass(frozen=True)
class StepDepth:
    """
    Attributes:
        counts: numbers of steps that the student is trained for; every batch has one of them, all as likely.
        needed: [N], the number of steps that each prompt needs.
    """

    counts: Sequence[int]
    needed: Tensor

    def steps(self, position: int, seed: int) -> int:
        """The number of steps of a batch."""
        return self.counts[int(torch.randint(len(self.counts), (), generator=generator("depth", seed, position)))]

    def rows(self, position: int, size: int, seed: int) -> list[int]:
        """The prompts of a batch of ``size``, drawn with replacement."""
        weights = torch.where(self.needed >= self.steps(position, seed), 1.0, EASY_WEIGHT)
        drawn = torch.multinomial(weights, size, replacement=True, generator=generator("prompts", seed, position))
        return drawn.tolist()
