"""Validation while a student trains: equal prompts and seeds each time, so that the log shows quality over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import applicable_scores, mean_scores
from fewstep.evaluation.images import as_float
from fewstep.inference.generate import generate
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.rewards.scorers import open_scorers


def validation_metrics(prompts: Sequence[str], scorers: Sequence[str] | None = None) -> list[str]:
    """The names of the metrics that :func:`make_validator` gives for these prompts. Arguments as there."""
    scores = [key for scorer in open_scorers(scorers).values() for key in applicable_scores(scorer, prompts)]
    return [f"val/{key}" for key in [*scores, "saturation", "hf_energy"]]


def make_validator(
    prompts: Sequence[str],
    scorers: Sequence[str] | None = None,
    further: Callable[[Tensor], Mapping[str, float]] | None = None,
) -> Callable[[TextToImagePipeline], Callable[[], dict[str, float]]]:
    """A function of a model that returns a function without arguments. This one samples the prompts with the model's
    present weights and returns ``val/*``: the mean scores, saturation and high-frequency energy.

    Args:
        prompts: at least one.
        scorers: by name; None is every scorer that needs no checkpoint. They are opened on the model's device.
        further: gives further metrics of the images, uint8 [N, H, W, 3], one of each prompt.
    """

    def validator(model: TextToImagePipeline) -> Callable[[], dict[str, float]]:
        opened = open_scorers(scorers, model.device).values()

        def validate() -> dict[str, float]:
            images = generate(model, prompts).images
            pixels = as_float(images)
            found = {key: mean for scorer in opened for key, mean in mean_scores(scorer.score(images, prompts)).items()}
            found |= {"saturation": measure.saturation(pixels), "hf_energy": measure.hf_energy(pixels)}
            found |= further(images) if further is not None else {}
            return {f"val/{key}": value for key, value in found.items()}

        return validate

    return validator
