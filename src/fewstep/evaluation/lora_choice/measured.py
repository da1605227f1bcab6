"""Draws the images of checkpoints and strengths, and measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.images import to_uint8
from fewstep.data.training_set.reading import TrainingSet
from fewstep.evaluation import metrics as measure
from fewstep.evaluation.applicability import mean_scores
from fewstep.evaluation.feature_networks import FeatureNetwork
from fewstep.evaluation.images import as_float
from fewstep.evaluation.kept_images import KeptImages
from fewstep.evaluation.lora_choice.measures import (
    likeness,
    likeness_within,
    memorization,
    prompts_recognized,
    relative_scores,
)
from fewstep.evaluation.lora_choice.rule import Figures, Reference
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.lora.swap import LoraSwap
from fewstep.models.lora.weights import Lora
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import Advance
from fewstep.rewards.protocol import Scorer

MAX_REAL = 500  # training images that are compared: more change the figures little


@dataclass(frozen=True)
class Drawn:
    """Images of the prompts of the set, then of the unseen ones.

    Attributes:
        images: uint8 [N, H, W, 3].
        features: [N, D].
        scores: means over the unseen prompts.
    """

    images: Tensor
    features: Tensor
    scores: dict[str, float]


class Drawing:
    """Draws the same prompts and seeds with one LoRA file after the other on one model, by the model's own steps.

    Args:
        known: prompts of the set; ``unseen``: others.
        kept: images of an earlier call that was interrupted.
    """

    def __init__(
        self,
        model: TextToImagePipeline,
        known: Sequence[str],
        unseen: Sequence[str],
        seed: int,
        network: FeatureNetwork,
        scorers: Sequence[Scorer],
        kept: KeptImages,
    ) -> None:
        self.model, self.known, self.unseen, self.seed = model, list(known), list(unseen), seed
        self.network, self.scorers, self.kept, self.swap = network, scorers, kept, LoraSwap(model.transformer)

    def __call__(self, name: str, lora: tuple[Lora, float] | None, digest: str, advance: Advance) -> Drawn:
        """The images with a LoRA at a strength; None is without. The first call is without: it identifies the model.

        Args:
            digest: of the file.
        """
        strength = 0.0 if lora is None else lora[1]
        prompts = [*self.known, *self.unseen]
        made_by = self.kept.made_by(self.model, prompts=prompts, seed=self.seed, lora=digest, strength=strength)
        result = self.kept.load(name, made_by)
        if result is None:
            self.swap.set([] if lora is None else [lora])
            params = SamplingParams(seed=self.seed)
            result = generate(self.model, prompts, params, lambda step: advance(step.finished))
            self.kept.save(name, made_by, result)
        else:
            advance(len(prompts))
        images = result.images
        others = images[len(self.known) :]
        scores = {
            f"{scorer.name}.{key}": value
            for scorer in self.scorers
            for key, value in mean_scores(scorer.score(others, self.unseen)).items()
        }
        return Drawn(images, self.network(images), scores)

    def figures(self, drawn: Drawn, without: Drawn, real: Tensor) -> Figures:
        """
        Args:
            real: features [M, D] of the training images.
        """
        count = len(self.known)
        own, others = drawn.features[:count], drawn.features[count:]
        flexibility = (
            relative_scores(drawn.scores, without.scores)
            if without.scores
            else prompts_recognized(others, without.features[count:])
        )
        pixels = as_float(drawn.images)
        return Figures(
            *(likeness(own, real), flexibility, memorization(own, real)),
            *(measure.saturation(pixels), measure.hf_energy(pixels)),
        )


def real_figures(images: TrainingSet, side: int, network: FeatureNetwork) -> tuple[Tensor, Figures]:
    """Features of training images, and their figures, at sizes of about ``side`` squared; evenly spread ones of a large
    set. Raises: UserError if one cannot be opened."""
    stride = -(-len(images.images) // MAX_REAL)
    features, statistics = [], []
    for image in images.images[::stride]:
        pixels = image.pixels(images.sizes(image, [side])[0])[None]
        features.append(network(to_uint8(pixels)))
        statistics.append([measure.saturation(pixels), measure.hf_energy(pixels)])
    found = torch.cat(features)
    saturation, hf_energy = torch.tensor(statistics).double().mean(0).tolist()
    return found, Figures(likeness_within(found), 1.0, 1.0, saturation, hf_energy)


def all_figures(
    drawing: Drawing, drawn: Mapping[str, Drawn], without: Drawn, real: tuple[Tensor, Figures]
) -> tuple[dict[str, Figures], Reference]:
    """The figures of each candidate, and what they are compared with."""
    features, own = real
    reference = Reference(drawing.figures(without, without, features), own)
    return {name: drawing.figures(one, without, features) for name, one in drawn.items()}, reference


def strength_name(strength: float) -> str:
    """The name of a candidate."""
    return f"strength {strength:g}"


def kept_name(file: Path, strength: float) -> str:
    """The name of kept images."""
    return f"{file.stem}-{strength:g}"
