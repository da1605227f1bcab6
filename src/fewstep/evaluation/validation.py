"""Validation while a student trains: equal prompts and seeds each time, so that the log shows quality over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fewstep.evaluation import metrics as measure
from fewstep.evaluation.image_sets import mean_score
from fewstep.evaluation.images import as_float
from fewstep.inference.generate import generate
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.rewards.scorers import default_scorers, open_scorer


def make_validator(
    model: TextToImagePipeline, prompts: Sequence[str], scorers: Sequence[str] | None = None
) -> Callable[[], dict[str, float]]:
    """A function that samples the prompts with the model's present weights and returns ``val/*``: the mean scores,
    saturation and high-frequency energy.

    Args:
        scorers: by name; None is every scorer that needs no checkpoint.
    """
    opened = default_scorers() if scorers is None else [open_scorer(name, model.device) for name in scorers]

    def validate() -> dict[str, float]:
        images = generate(model, prompts).images
        pixels = as_float(images)
        scores = {key: mean_score(each) for scorer in opened for key, each in scorer.score(images, prompts).items()}
        found = {key: value for key, value in scores.items() if value is not None}
        found |= {"saturation": measure.saturation(pixels), "hf_energy": measure.hf_energy(pixels)}
        return {f"val/{key}": value for key, value in found.items()}

    return validate
