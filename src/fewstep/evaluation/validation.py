"""Validation while a student trains: equal prompts and seeds each time, so that the log shows quality over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fewstep.config.sections import EvaluateSettings, WatchSettings
from fewstep.data.images import middle_frame
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import applicable_scores, mean_scores
from fewstep.evaluation.feature_networks import DEFAULT
from fewstep.evaluation.images import as_float
from fewstep.evaluation.watch import RewardWatch, check_untrained, hacking_rules, watch_metrics
from fewstep.inference.divided import Divided
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.rewards.protocol import Scorer
from fewstep.rewards.scorers import open_scorers
from fewstep.training.alerts import Rule


def validation_metrics(
    prompts: Sequence[str],
    scorers: Sequence[str] | None = None,
    rewards: Mapping[str, float] | None = None,
    features: str = DEFAULT,
) -> list[str]:
    """The names of the metrics that a :class:`Validator` gives for these prompts. Arguments as there."""
    scores = [key for scorer in open_scorers(scorers).values() for key in applicable_scores(scorer, prompts)]
    return [*(f"val/{key}" for key in [*scores, "saturation", "hf_energy"]), *watch_metrics(rewards, features)]


class Validator:
    """Called with a student and its teacher it returns a function without arguments, which samples the prompts with the
    student's present weights and returns ``val/*``: the mean scores, saturation and high-frequency energy; where
    a reward is trained on, also what :class:`fewstep.evaluation.watch.RewardWatch` measures. Of videos the frame in the
    middle is measured. Several processes (``divided``) make their shares of the images and scores.

    Args:
        prompts: at least one.
        scorers: by name; None is every scorer that needs no checkpoint. They are opened on the student's device.
        rewards: what is trained on, "name" or "name:argument" -> weight; none where a discriminator is the reward.
            None: no reward is trained on.
        features: the watch's feature network.
        further: gives further metrics of the images, uint8 [N, H, W, 3], one of each prompt.

    Raises:
        UserError: a scorer is a reward that is trained on.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        scorers: Sequence[str] | None = None,
        rewards: Mapping[str, float] | None = None,
        features: str = DEFAULT,
        watch: WatchSettings | None = None,
        further: Callable[[Tensor], Mapping[str, float]] | None = None,
    ) -> None:
        check_untrained(rewards or {}, scorers)
        self.prompts, self.scorers, self.rewards = list(prompts), scorers, rewards
        self.features, self.watch, self.further = features, watch or WatchSettings(), further

    @classmethod
    def of(cls, prompts: Sequence[str], settings: EvaluateSettings, rewards: Mapping[str, float] | None) -> Validator:
        """The validator of a recipe's settings."""
        return cls(prompts, settings.scorers, rewards, settings.features, settings.watch)

    @property
    def watches(self) -> bool:
        """Whether rewards are trained on."""
        return self.rewards is not None

    def alert_rules(self) -> Sequence[Rule]:
        """The alarms of the watch."""
        if self.rewards is None:
            return []
        scores = [key for one in open_scorers(self.scorers).values() for key in applicable_scores(one, self.prompts)]
        return hacking_rules([f"val/{key}" for key in scores], self.watch, fixed=bool(self.rewards))

    def __call__(
        self, student: TextToImagePipeline, teacher: TextToImagePipeline, divided: Divided | None = None
    ) -> Callable[[], dict[str, float]]:
        divided = divided or Divided()
        opened = open_scorers(self.scorers, student.device).values()
        watch = None
        if self.rewards is not None:
            watch = RewardWatch(student, teacher, self.prompts, self.rewards, self.features, self.watch, divided)

        def validate() -> dict[str, float]:
            images = middle_frame(divided.generate(student, self.prompts))
            pixels = as_float(images)
            scores: dict[str, float] = {}
            for scorer in opened:
                scores |= mean_scores(divided_scores(scorer, images, self.prompts, divided))
            scores |= {"saturation": measure.saturation(pixels), "hf_energy": measure.hf_energy(pixels)}
            scores |= self.further(images) if self.further is not None else {}
            found = {f"val/{key}": value for key, value in scores.items()}
            return found | (watch(images) if watch is not None else {})

        return validate


def divided_scores(scorer: Scorer, images: Tensor, prompts: Sequence[str], divided: Divided) -> dict[str, Tensor]:
    """A scorer's scores of images, each process's share by itself; every score is float [N]."""
    rows = divided.rows(len(prompts))
    own = scorer.score(images[rows], [prompts[row] for row in rows])
    return {key: divided.join(values, len(prompts)) for key, values in own.items()}
