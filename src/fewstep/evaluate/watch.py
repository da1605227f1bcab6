"""A short evaluation while a student trains: the same few prompts and seeds each time, so that its log shows quality
against time."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.data.emoji import Concept, EmojiWorld
from fewstep.evaluate import metrics as measure
from fewstep.evaluate.evaluate import emoji_prompts
from fewstep.evaluate.images import as_float
from fewstep.evaluate.judge import Judge, hits
from fewstep.generate import generate
from fewstep.models.pipeline import TextToImage


def quality_of(model: TextToImage, count: int) -> Callable[[], dict[str, float]]:
    """A function that generates from ``count`` held-out prompts of the emoji world and gives ``quality/*``: the judge's
    accuracies, saturation and high-frequency energy."""
    prompts = emoji_prompts(count, seed=1)  # not those of the final evaluation
    world, judge = EmojiWorld.load(), Judge.load()
    parsed = [world.parse(prompt) for prompt in prompts]
    concepts: list[Concept] = [concept for concept in parsed if concept is not None]
    assert len(concepts) == len(prompts)

    def quality() -> dict[str, float]:
        images = generate(model, prompts, seed=0).images
        pixels = as_float(images)
        found = {key: float(right.float().mean()) for key, right in hits(judge(images), concepts).items()}
        found |= {"saturation": measure.saturation(pixels), "hf_energy": measure.hf_energy(pixels)}
        return {f"quality/{key}": value for key, value in found.items()}

    return quality
