"""A weighted sum of rewards, each normalized by its running mean and deviation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fewstep.errors import StopTraining, UserError
from fewstep.progress import log_line
from fewstep.rewards.guarded import guarded_scores
from fewstep.rewards.moments import FailureShare, Reduce, RunningMoments
from fewstep.rewards.protocol import Reward, RewardInfo

#: The share of failures is not judged before so many samples.
MIN_ATTEMPTS = 16
#: Failures of a reward that are reported one by one; further ones are counted.
REPORTED = 5


class WeightedRewards:
    """A reward: ``sum_i weight_i (r_i - mean_i) / max(deviation_i, floor_i)``.

    Mean and deviation are those of the scores before the present batch, so that the scores of a batch do not depend on
    one another; the very first batch, which has no past, is normalized by its own.

    A sample that a reward cannot score is reported with its prompt, skipped and counted: its sum is NaN, without
    gradient, and the caller leaves it out.

    Args:
        rewards: name -> reward and weight; a negative weight is a penalty.
        micro_batch: images that are scored at a time.
        normalize: False sums the scores as they are.
        floor: least deviation that is divided by, relative to the width of a reward's range, or to 1 where that is
            infinite.
        window: scores that the past counts as at most; older ones lose weight.
        max_failures: share of recent samples, of 256 at most, that a reward may fail on.
        reduce: sums a tensor over the processes that train together; all then have the same statistics, and stop in the
            same step.

    Attributes:
        scores: name -> float32 [B], the last batch's scores as the rewards gave them, detached, NaN where one failed.
        failures: name -> samples that could not be scored so far.

    Raises:
        UserError: there is no reward, or an argument is out of range.
    """

    name = "weighted"

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward, float]],
        micro_batch: int = 8,
        *,
        normalize: bool = True,
        floor: float = 5e-3,
        window: int = 4096,
        max_failures: float = 0.1,
        reduce: Reduce = lambda tensor: tensor,
    ) -> None:
        if not rewards:
            raise UserError("rewards: name at least one")
        if micro_batch < 1:
            raise UserError(f"rewards: micro_batch must be at least 1, got {micro_batch}")
        if not floor > 0:
            raise UserError(f"rewards: floor must be above 0, got {floor}")
        self.rewards, self.micro_batch = dict(rewards), micro_batch
        self.normalize, self.floor, self.max_failures = normalize, floor, max_failures
        self.scores: dict[str, Tensor] = {}
        self._moments = {name: RunningMoments(window, reduce) for name in rewards}
        self._failed = {name: FailureShare(256, reduce) for name in rewards}

    @property
    def info(self) -> RewardInfo:
        infos = [reward.info for reward, _ in self.rewards.values()]
        bounds = [sorted(weight * bound for bound in reward.info.range) for reward, weight in self.rewards.values()]
        return RewardInfo(
            differentiable=all(info.differentiable for info in infos),
            range=(-math.inf, math.inf) if self.normalize else (sum(b[0] for b in bounds), sum(b[1] for b in bounds)),
            license="; ".join(dict.fromkeys(info.license for info in infos)),
            parameters=sum(info.parameters for info in infos),
            activations=max(info.activations for info in infos),
        )

    @property
    def failures(self) -> dict[str, int]:
        return {name: failed.total for name, failed in self._failed.items()}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Sums float32 [B], NaN where a reward failed. Updates the statistics.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            StopTraining: a reward fails too often.
        """
        scores = self.score(images, prompts)
        first = {name for name in scores if not self._moments[name].count}
        self._update(scores, first)
        combined = self.combine(scores)
        self._update(scores, scores.keys() - first)
        self.scores = {name: values.detach() for name, values in scores.items()}
        return combined

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores of each reward as it gives them, name -> float32 [B], NaN where it failed. Statistics stay as they
        are; failures are counted.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            StopTraining: a reward fails too often.
        """
        scores: dict[str, Tensor] = {}
        problems: dict[str, list[str]] = {}
        for name, (reward, _) in self.rewards.items():
            scores[name], found = guarded_scores(reward, images, prompts, self.micro_batch)
            problems[name] = [problem.text for problem in found.values()]
            self._report(name, problems[name])
            self._failed[name].update(scores[name].isnan())
        for name, failed in self._failed.items():  # the same on all processes
            if failed.attempts >= MIN_ATTEMPTS and failed.share > self.max_failures:
                example = f"; {problems[name][-1]}" if problems[name] else ""
                raise StopTraining(
                    f"{name}: no score for {failed.share:.0%} of the last {failed.attempts:.0f} images, more than "
                    f"max_failures {self.max_failures:.0%}{example}"
                )
        return scores

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what :meth:`score` returned, normalized by the present statistics: float32 [B]."""
        return torch.stack(
            [weight * self._normalized(name, scores[name]) for name, (_, weight) in self.rewards.items()]
        ).sum(0)

    def state_dict(self) -> dict[str, Tensor]:
        """Statistics and counts of failures, float64."""
        moments = {f"{name}.moments": each.state() for name, each in self._moments.items()}
        return moments | {f"{name}.failures": each.state() for name, each in self._failed.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned. Raises: KeyError if it is of other rewards."""
        for name in self.rewards:
            self._moments[name].load(state[f"{name}.moments"])
            self._failed[name].load(state[f"{name}.failures"])

    def _normalized(self, name: str, values: Tensor) -> Tensor:
        if not self.normalize:
            return values
        low, high = self.rewards[name][0].info.range
        floor = self.floor * (high - low if math.isfinite(high - low) else 1.0)
        moments = self._moments[name]
        return (values - moments.mean) / max(moments.deviation, floor)

    def _update(self, scores: Mapping[str, Tensor], names: Collection[str]) -> None:
        for name in self.rewards:  # in the same order on all processes
            if name in names:
                self._moments[name].update(scores[name])

    def _report(self, name: str, problems: Sequence[str]) -> None:
        """Reports the first failures of a reward one by one."""
        before = self._failed[name].total
        for index, problem in enumerate(problems[: max(0, REPORTED - before)], before + 1):
            last = "; further ones are counted only" if index == REPORTED else ""
            log_line(f"{problem}; its sample is skipped{last}")
