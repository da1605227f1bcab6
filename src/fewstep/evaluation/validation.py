"""A short evaluation while a student trains: the same few prompts and seeds each time, so that its log shows quality
against time."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.emoji.classifier import EmojiClassifier, correct
from fewstep.emoji.dataset import EmojiDataset, EmojiSpec
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.images import as_float
from fewstep.evaluation.runner import emoji_prompts
from fewstep.inference.generate import generate
from fewstep.models.pipeline import TextToImagePipeline


def make_validator(model: TextToImagePipeline, count: int) -> Callable[[], dict[str, float]]:
    """A function that generates from ``count`` held-out prompts of the emoji world and gives ``quality/*``: the judge's
    accuracies, saturation and high-frequency energy."""
    prompts = emoji_prompts(count, "validation")
    world, judge = EmojiDataset.load(), EmojiClassifier.load()
    parsed = [world.parse(prompt) for prompt in prompts]
    concepts: list[EmojiSpec] = [concept for concept in parsed if concept is not None]
    assert len(concepts) == len(prompts)

    def quality() -> dict[str, float]:
        images = generate(model, prompts).images
        pixels = as_float(images)
        hits = correct(judge(images), concepts).values()
        keys = ("name_top1", "style_top1", "color_top1")
        found = {key: float(right.float().mean()) for key, right in zip(keys, hits, strict=True)}
        found |= {"saturation": measure.saturation(pixels), "hf_energy": measure.hf_energy(pixels)}
        return {f"quality/{key}": value for key, value in found.items()}

    return quality
