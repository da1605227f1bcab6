"""Where DPO's pairs come from: samples of the student that rewards score, or images that people voted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.method import BatchSource, Shard
from fewstep.core.samplers import SamplerStep, iterate
from fewstep.data.batch import DistillBatch
from fewstep.data.preference_batches import PairBatch
from fewstep.methods.dmd.terms.scoring import LatentScorer
from fewstep.methods.rl.dpo import best_and_worst, image_steps


@dataclass(frozen=True)
class Pairs:
    """Steps of samples, the rows of winners and losers [P], and whether a pair counts [P]."""

    steps: Sequence[SamplerStep]
    prompts: EncodedPrompts
    winners: Tensor
    losers: Tensor
    counted: Tensor


class PairMaker(Protocol):
    """A batch -> preference pairs, with state for checkpoints and metrics."""

    def __call__(self, batch: DistillBatch) -> Pairs: ...
    def frozen_bytes(self) -> dict[str, float]: ...
    def metrics(self) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class SampledPairs:
    """The best and the worst sample of each group, from stochastic rollouts of the student.

    Args:
        sigmas: the student's noise levels from 1 down, with the terminal 0.
        eta: share of fresh noise.
        least_difference: of a pair's scores, in running deviations; other pairs do not count.
    """

    def __init__(
        self,
        student: Denoiser,
        scorer: LatentScorer,
        sigmas: Sequence[float],
        eta: float,
        group_size: int,
        least_difference: float,
    ) -> None:
        self.student, self.scorer, self.sigmas, self.eta = student, scorer, list(sigmas), eta
        self.group_size, self.least_difference = group_size, least_difference

    def __call__(self, batch: DistillBatch) -> Pairs:
        made = iterate(self.student, batch.noise, self.sigmas, batch.prompts, sampler="sde", eta=self.eta)
        steps = list(made)
        z = self.scorer.combined(steps[-1].x_next, batch.texts)
        found = best_and_worst(z, self.group_size, self.least_difference)
        return Pairs([step for step in steps if step.std > 0], batch.prompts, *found)

    def frozen_bytes(self) -> dict[str, float]:
        return self.scorer.frozen_bytes()

    def metrics(self) -> dict[str, Tensor]:
        return self.scorer.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        return self.scorer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.scorer.load_state_dict(state)


class VotedPairs:
    """Images that were voted on, at the student's levels.

    Args:
        source: gives batches of pairs, by their position.
        shard: this process's part of each.
        sigmas, eta: as for :class:`SampledPairs`.
    """

    def __init__(self, source: BatchSource, shard: Shard, sigmas: Sequence[float], eta: float) -> None:
        self.source, self.shard, self.sigmas, self.eta = source, shard, list(sigmas), eta
        self.position = 0

    def __call__(self, batch: DistillBatch) -> Pairs:
        pairs: PairBatch = self.source(self.position, self.shard)
        self.position += 1
        count = len(pairs.winners)
        steps = image_steps(torch.cat([pairs.winners, pairs.losers]), self.sigmas, self.eta, count)
        winners = torch.arange(count, device=pairs.winners.device)
        counted = torch.ones_like(winners, dtype=torch.bool)
        return Pairs(steps, EncodedPrompts.concat([pairs.prompts] * 2), winners, winners + count, counted)

    def frozen_bytes(self) -> dict[str, float]:
        return {}

    def metrics(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.position = int(state["position"])
