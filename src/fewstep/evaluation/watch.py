"""The watch for reward hacking: what is trained on beside what is not, on fixed prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.config.sections import WatchSettings
from fewstep.core.seeds import image_seed
from fewstep.data.images import middle_frame
from fewstep.errors import UserError
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.feature_networks import DEFAULT, open_features
from fewstep.evaluation.images import as_float
from fewstep.evaluation.teacher_distance import TeacherDistance, distance_name
from fewstep.inference.divided import Divided
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.rewards.guarded import guarded_scores
from fewstep.rewards.open import open_reward
from fewstep.rewards.protocol import Reward
from fewstep.training.alerts import AlertRule, DivergenceRule, Rule

REWARD, DIVERSITY = "val/reward", "val/diversity"

_MICRO_BATCH = 8
_CAUSE = (
    "the student exploits the reward; lower its weight or balance, raise that of distribution_matching, or keep an "
    "earlier checkpoint"
)


def watch_metrics(rewards: Mapping[str, float] | None, features: str = DEFAULT) -> list[str]:
    """The names of the metrics of :class:`RewardWatch`; none where no reward is trained on (None)."""
    if rewards is None:
        return []
    single = [f"{REWARD}_{name}" for name in _names(rewards)] if len(rewards) > 1 else []
    return [*([REWARD] if rewards else []), *single, DIVERSITY, f"val/{distance_name(open_features(features).name)}"]


def hacking_rules(scores: Sequence[str], settings: WatchSettings, fixed: bool) -> Sequence[Rule]:
    """Alarms for each measure that is not trained on: the reward is above its value at the start, the measure below
    ``settings.share`` of its own, for ``settings.steps`` steps.

    Args:
        scores: names of the metrics of scorers, of which more is better.
        fixed: False: the reward is a discriminator, whose scores cannot be compared over time; the measure alone
            raises the alarm.
    """
    if not fixed:
        return [AlertRule(name, "fallen", settings.share, settings.steps, _CAUSE) for name in (*scores, DIVERSITY)]
    return [DivergenceRule(REWARD, name, settings.share, settings.steps, _CAUSE) for name in (*scores, DIVERSITY)]


class RewardWatch:
    """Measures a student's images by the rewards it is trained on, by diversity, and by distance to the teacher's.

    Args:
        rewards: "name" or "name:argument" -> weight; none where a discriminator is the reward.
        features: the feature network of diversity and distance.
        divided: the processes that make images, features and scores.

    Raises:
        UserError: a reward or the network cannot be opened.
    """

    def __init__(
        self,
        student: TextToImagePipeline,
        teacher: TextToImagePipeline,
        prompts: Sequence[str],
        rewards: Mapping[str, float],
        features: str,
        settings: WatchSettings,
        divided: Divided | None = None,
    ) -> None:
        self.divided = divided or Divided()
        self.student, self.teacher, self.prompts, self.settings = student, teacher, list(prompts), settings
        self.weights = dict(zip(_names(rewards), rewards.values(), strict=True))
        opened = [open_reward(spec, student.device) for spec in rewards]
        self.rewards = dict(zip(self.weights, opened, strict=True))
        self.network = open_features(features, student.device)
        self._distance: TeacherDistance | None = None

    def distance(self, features: Tensor) -> dict[str, float]:
        """To the teacher, whose images are made at the first validation."""
        if self._distance is None:
            steps = self.settings.teacher_steps
            self._distance = TeacherDistance(self.teacher, self.prompts, self.network, steps, divided=self.divided)
        return self._distance.of_features(features)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """``val/reward`` (the weighted sum of the rewards' means, if any), each reward's mean where there are several,
        ``val/diversity`` and the distance to the teacher, ``val/fd_teacher[NETWORK]``.

        Args:
            images: uint8 [N, H, W, 3], of the prompts.
        """
        pixels = as_float(images).to(self.student.device)
        means = {name: float(self._scores(reward, pixels).nanmean()) for name, reward in self.rewards.items()}
        found = {REWARD: sum(self.weights[name] * mean for name, mean in means.items())} if means else {}
        if len(means) > 1:
            found |= {f"{REWARD}_{name}": mean for name, mean in means.items()}
        features = self._features(images)
        found[DIVERSITY] = measure.diversity(self._seed_features(features))
        if len(images) > 1:
            found |= {f"val/{name}": value for name, value in self.distance(features).items()}
        return found

    def _scores(self, reward: Reward, pixels: Tensor) -> Tensor:
        def own(rows: list[int]) -> Tensor:
            return guarded_scores(reward, pixels[rows], [self.prompts[row] for row in rows], _MICRO_BATCH)[0]

        return self.divided.apply(own, len(pixels))

    def _features(self, images: Tensor) -> Tensor:
        return self.divided.apply(lambda rows: self.network(images[rows]), len(images))

    def _seed_features(self, features: Tensor) -> Tensor:
        """[P, S, D] of several seeds of the first prompts, of which the main images are the first."""
        some = self.prompts[: self.settings.diversity_prompts]
        more = [prompt for prompt in some for _ in range(self.settings.diversity_seeds - 1)]
        params = SamplingParams(seed=image_seed(0, len(self.prompts)))
        images = middle_frame(self.divided.generate(self.student, more, params))
        others = self._features(images).unflatten(0, (len(some), -1))
        return torch.cat([features[: len(some), None], others], dim=1)


def check_untrained(rewards: Mapping[str, float], scorers: Sequence[str] | None) -> None:
    """Raises: UserError if the result would be measured by what is trained on."""
    both = [spec for spec in scorers or () if spec in rewards]
    if both:
        raise UserError(
            f"evaluate.scorers: {both[0]} is trained on, which a scorer must not be; it is logged as {REWARD} anyway"
        )


def _names(rewards: Mapping[str, float]) -> list[str]:
    """The rewards' names for metrics, the argument left out where that tells them apart."""
    short = [spec.partition(":")[0] for spec in rewards]
    return short if len(set(short)) == len(short) else list(rewards)
