"""What an evaluation costs: counted before it starts, timed on one batch, and bounded by the number of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.evaluation.settings import Setting
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams

MIN_PROMPTS = 2  # an evaluation needs as many
_TIMED = 8  # images that are timed


@dataclass(frozen=True)
class Cost:
    """
    images: of each setting: one of every prompt, and further seeds of the first ones for the diversity.
    passes: of a transformer for one image, over all settings; a guided step takes two.
    """

    images: int
    passes: int
    settings: int

    @property
    def text(self) -> str:
        return (
            f"{self.images:,} images in each of {self.settings} settings, {self.images * self.passes:,} forward passes "
            "for one image each"
        )


def nfe(steps: int, guided: bool) -> int:
    """Forward passes of one image, without truncated guidance."""
    return 2 * steps if guided else steps


def evaluation_cost(prompts: int, passes: Sequence[int], diversity_prompts: int, diversity_seeds: int) -> Cost:
    """The cost of settings with these numbers of passes for an image. Arguments as for ``evaluate``."""
    images = prompts + min(diversity_prompts, prompts) * (diversity_seeds - 1)
    return Cost(images, sum(passes), len(passes))


def expected_minutes(cost: Cost, settings: Sequence[Setting], prompts: Sequence[str]) -> float:
    """The minutes for sampling and decoding, from one and two steps of a few images of the first setting's model."""
    model, some = settings[0].model, list(prompts[:_TIMED])
    one, two = (SamplingParams(steps=steps, guidance_scale=0.0) for steps in (1, 2))
    generate(model, some, one)  # the first call is slower
    first, second = (generate(model, some, params).seconds / len(some) for params in (one, two))
    step = max(second - first, 0.1 * first)
    decoding = max(first - step, 0.0)
    return cost.images * (cost.passes * step + cost.settings * decoding) / 60


def affordable_prompts(prompts: int, fraction: float, diversity_prompts: int, diversity_seeds: int) -> int:
    """The most prompts, at least ``MIN_PROMPTS``, whose images are at most this fraction of those of all prompts."""
    allowed = fraction * evaluation_cost(prompts, [1], diversity_prompts, diversity_seeds).images
    fitting = (
        count
        for count in range(prompts, MIN_PROMPTS, -1)
        if evaluation_cost(count, [1], diversity_prompts, diversity_seeds).images <= allowed
    )
    return next(fitting, MIN_PROMPTS)
