"""Trains a model's step chooser: images at every number of steps, scores, labels, a regression, a threshold.

Labels are made from scores of the images (``step_labels``). A part of the prompts is held out: the threshold is the one
that saves the most steps there within the seeds' noise, and each half of that part is judged by the threshold of the
other half, beside fixed numbers of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewstep.data.trajectories import template_hash
from fewstep.errors import UserError
from fewstep.evaluation.step_labels import (
    fixed_quality,
    mean_steps,
    quality,
    seed_noise,
    shuffled_quality,
    step_labels,
)
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.inference.step_chooser import StepChooser, fit, prompt_features
from fewstep.models.frames import check_one_frame
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import ProgressBars
from fewstep.rewards.scorers import RewardScorer

DECAYS = (1e-3, 1e-2, 1e-1, 1.0)  # of the regression's weights; the held-out likelihood decides
THRESHOLDS = tuple(step / 50 for step in range(1, 50))
LEAST_PROMPTS = 40


@dataclass(frozen=True)
class StepStudy:
    """What a training found.

    Attributes:
        noise: of the seeds, in the reward's units.
        labels: prompts of the training part that need each count.
        fixed: mean score of held-out prompts at each count.
        steps, score: of the chooser on held-out prompts; mean steps, mean score.
        same_cost: mean score of all prompts alike at these mean steps.
        shuffled: mean score of the same counts, given to the prompts at random.
    """

    counts: tuple[int, ...]
    noise: float
    labels: list[int]
    fixed: list[float]
    steps: float
    score: float
    same_cost: float
    shuffled: float

    @property
    def pays(self) -> bool:
        """Whether choosing is better than both ways to spend the same steps without looking at the prompt."""
        return self.score > max(self.same_cost, self.shuffled)


def score_counts(
    pipeline: TextToImagePipeline, prompts: Sequence[str], counts: Sequence[int], seeds: int, reward: RewardScorer
) -> Tensor:
    """Scores [N, K, S] of images of N prompts at K counts from the same S seeds each.

    Raises:
        UserError: the reward has no score for a prompt.
    """
    check_one_frame(pipeline.generation_config.frames, f"reward {reward.name}")
    found = torch.empty(len(prompts), len(counts), seeds)
    with ProgressBars() as bars:
        advance = bars.add("images", found.numel())
        for column, count in enumerate(counts):
            for seed in range(seeds):
                first = seed * len(prompts)
                params = SamplingParams(steps=count, seed=first)
                images = generate(pipeline, prompts, params, lambda step: advance(step.finished)).images
                (scores,) = reward.score(images, prompts).values()
                found[:, column, seed] = scores
    missing = found.isnan().any(dim=2).any(dim=1).nonzero().flatten().tolist()
    if missing:
        raise UserError(f"reward {reward.name}: no score for {prompts[missing[0]]!r}; give prompts that it can score")
    return found


def train_chooser(
    pipeline: TextToImagePipeline,
    prompts: Sequence[str],
    scores: Tensor,
    counts: Sequence[int],
    budget: float | None = None,
) -> tuple[StepChooser, StepStudy]:
    """A chooser, and how it does on prompts that it was not trained on: the last quarter of them.

    Args:
        prompts: in random order.
        scores: as :func:`score_counts` gives them.
        budget: mean steps on held-out prompts, which the threshold does not exceed; None: it saves steps without loss.

    Raises:
        UserError: there are too few prompts.
    """
    if len(prompts) < LEAST_PROMPTS:
        raise UserError(f"{len(prompts)} prompts: give at least {LEAST_PROMPTS}")
    features = prompt_features(pipeline.encoder, prompts)
    return train_on_features(features, scores, counts, template_hash(pipeline.encoder), budget=budget)


def train_on_features(
    features: Tensor,
    scores: Tensor,
    counts: Sequence[int],
    made_by: str,
    noise: float | None = None,
    budget: float | None = None,
) -> tuple[StepChooser, StepStudy]:
    """As :func:`train_chooser`, for pooled features [N, D]; ``noise`` None is that of the scores' seeds."""
    held_out = len(features) // 4
    noise = seed_noise(scores) if noise is None else noise
    labels = step_labels(scores, noise)
    fitted = [fit(features[:-held_out], labels[:-held_out], counts, decay, made_by) for decay in DECAYS]
    best = max(fitted, key=lambda one: _likelihood(one, features[-held_out:], labels[-held_out:]))
    rest, judged = features[-held_out:], scores[-held_out:]
    chooser = replace(best, threshold=_threshold(best, rest, judged, noise, budget))
    chosen = torch.empty(held_out, dtype=torch.long)
    for own in (slice(0, None, 2), slice(1, None, 2)):  # each half by the threshold of the other
        other = slice(1 - (own.start or 0), None, 2)
        threshold = _threshold(best, rest[other], judged[other], noise, budget)
        chosen[own] = _indices(replace(best, threshold=threshold), rest[own])
    steps = mean_steps(counts, chosen)
    study = StepStudy(
        counts=tuple(counts),
        noise=noise,
        labels=torch.bincount(labels[:-held_out], minlength=len(counts)).tolist(),
        fixed=judged.mean(dim=(0, 2)).tolist(),
        steps=steps,
        score=quality(judged, chosen),
        same_cost=fixed_quality(judged, counts, steps),
        shuffled=shuffled_quality(judged, chosen),
    )
    return chooser, study


def _likelihood(chooser: StepChooser, features: Tensor, labels: Tensor) -> float:
    above = (labels[:, None] > torch.arange(len(chooser.counts) - 1)).float()
    return -float(torch.nn.functional.binary_cross_entropy(chooser.more_needed(features), above))


def _indices(chooser: StepChooser, features: Tensor) -> Tensor:
    return torch.tensor([chooser.counts.index(count) for count in chooser.choose(features)])


def _threshold(chooser: StepChooser, features: Tensor, scores: Tensor, noise: float, budget: float | None) -> float:
    """The largest threshold with which the mean score is within the noise of a mean over these prompts of that at the
    most steps; the least one if none is. With a budget, the least threshold with at most these mean steps; the largest
    one if none has."""
    if budget is not None:
        cost = {
            one: mean_steps(chooser.counts, _indices(replace(chooser, threshold=one), features)) for one in THRESHOLDS
        }
        return min((one for one in THRESHOLDS if cost[one] <= budget), default=THRESHOLDS[-1])
    allowed = float(scores[:, -1].mean()) - noise / len(scores) ** 0.5
    fine = [
        threshold
        for threshold in THRESHOLDS
        if quality(scores, _indices(replace(chooser, threshold=threshold), features)) >= allowed
    ]
    return max(fine, default=THRESHOLDS[0])


def rows(study: StepStudy) -> list[tuple[str, float, float]]:
    """Lines of a table: what, mean steps, mean score on held-out prompts."""
    fixed = [(f"{count} steps", float(count), score) for count, score in zip(study.counts, study.fixed, strict=True)]
    return [
        *fixed,
        ("steps auto", study.steps, study.score),
        ("the same mean steps for all prompts alike", study.steps, study.same_cost),
        ("the same numbers of steps, given out at random", study.steps, study.shuffled),
    ]


def print_study(study: StepStudy, reward: str) -> None:
    """The table, and a line that says whether choosing pays."""
    table = Table(title=f"Held-out prompts, mean score by {reward}")
    for column in ("", "mean steps", "mean score"):
        table.add_column(column, justify="left" if not column else "right")
    for name, steps, score in rows(study):
        table.add_row(name, f"{steps:.2f}", f"{score:.4f}")
    console = Console()
    console.print(table)
    needed = ", ".join(f"{n} need {count}" for count, n in zip(study.counts, study.labels, strict=True))
    console.print(f"training prompts: {needed}; noise of the seeds {study.noise:.4f}")
    better = "is better than" if study.pays else "is NOT better than both ways of spending"
    console.print(f"choosing {better} the same steps without a look at the prompt")


def check_counts(text: str) -> list[int]:
    """Numbers of steps from "1,2,4,8". Raises: UserError if they are not at least two ascending numbers."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if len(counts) < 2 or counts[0] < 1 or counts != sorted(set(counts)):
        raise UserError(f"--counts {text}: give at least two ascending numbers of steps, such as 1,2,4,8")
    return counts


def check_budget(budget: float | None, counts: Sequence[int]) -> None:
    """Raises: UserError if mean steps are not between the least and the most of ``counts``."""
    if budget is not None and not counts[0] < budget < counts[-1]:
        raise UserError(
            f"--mean-steps {budget:g}: give a number between {counts[0]} and {counts[-1]}, those of --counts"
        )
