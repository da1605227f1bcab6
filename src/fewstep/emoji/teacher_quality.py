"""The quality of a micro teacher on prompts of the emoji dataset, beside that of real images."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.emoji.classifier import ACCURACIES
from fewstep.emoji.dataset import LANGUAGES, NUM_TEMPLATES, EmojiDataset, EmojiSpec, Split
from fewstep.emoji.nearest_real import NearestReal
from fewstep.emoji.scorer import EmojiScorer
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.images import as_float, as_uint8
from fewstep.evaluation.metrics import frechet_distance, hf_energy
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import track

GUIDANCE_SCALES = (2.0, 3.0, 4.0)  # candidates
STEPS, FEW_STEPS = 50, 4
NEAREST = "nearest_real_acc"
SCORES = (*ACCURACIES, NEAREST)  # each the mean over images of 1 where it is right

Quality = dict[str, float]


def prompts_of(specs: list[EmojiSpec]) -> list[str]:
    """The prompts of specs, worded by each template in turn."""
    dataset = EmojiDataset.load()
    return [dataset.prompt(spec, index % NUM_TEMPLATES) for index, spec in enumerate(specs)]


def score(images: Tensor, prompts: list[str]) -> Quality:
    """Mean scores of images, uint8 [N, H, W, 3]: object, style and background by the classifier, object by the nearest
    real emoji."""
    scores = EmojiScorer().score(images, prompts) | NearestReal().score(images, prompts)
    return {key: scores[key].mean().item() for key in SCORES}


def generated(model: TextToImagePipeline, prompts: list[str], steps: int, guidance: float) -> Tensor:
    """Images of the prompts, uint8 [N, H, W, 3]."""
    return generate(model, prompts, SamplingParams(steps=steps, guidance_scale=guidance)).images


def best_guidance(model: TextToImagePipeline, count: int) -> tuple[float, list[Quality]]:
    """The best guidance scale at 50 steps on training prompts, and the scores of all candidates.

    Best is the largest sum of object accuracy and nearest-real accuracy: the first falls without guidance, the second
    where too much guidance distorts.
    """
    prompts = prompts_of(EmojiDataset.load().sample(count, "train", seed=3))
    tried = [
        {"guidance_scale": scale, **score(generated(model, prompts, STEPS, scale), prompts)}
        for scale in track(GUIDANCE_SCALES, "guidance")
    ]
    return max(tried, key=lambda row: row["object_acc"] + row[NEAREST])["guidance_scale"], tried


def by_split_and_language(model: TextToImagePipeline, guidance: float, count: int) -> dict[str, Quality]:
    """Scores at 50 steps on other prompts than those that selected the guidance scale, ``count`` in each cell."""
    dataset = EmojiDataset.load()
    splits: tuple[Split, ...] = ("train", "test")
    quality = {}
    for split, language in track([(s, each) for s in splits for each in LANGUAGES], "measuring accuracy"):
        pool = dataset.sample(len(dataset.specs(split)), split, seed=4)
        prompts = prompts_of([spec for spec in pool if spec.language == language][:count])
        quality[f"{split}, {language}"] = score(generated(model, prompts, STEPS, guidance), prompts)
    return quality


@torch.no_grad()
def beside_real_images(model: TextToImagePipeline, guidance: float, count: int) -> dict[str, Quality]:
    """Scores of real images, of these after encoding and decoding, and of generated images with many and few steps,
    with and without guidance, all for the same ``count`` test prompts.

    ``fd_real`` is the Fréchet distance of features to other real images of these prompts, ``sharpness`` the ratio of
    high-frequency energy to theirs.
    """
    dataset, network = EmojiDataset.load(), open_features()
    specs = dataset.sample(count, "test", seed=5)
    prompts = prompts_of(specs)
    reference = as_uint8(dataset.render(specs, torch.Generator().manual_seed(6)))
    real = dataset.render(specs, torch.Generator().manual_seed(7))
    features = network(reference)
    sets = {
        "real images": lambda: as_uint8(real),
        "real images, encoded and decoded": lambda: as_uint8(model.decode(model.encode_images(real)).clamp(0, 1)),
        f"{STEPS} steps": lambda: generated(model, prompts, STEPS, guidance),
        f"{STEPS} steps, no guidance": lambda: generated(model, prompts, STEPS, 0.0),
        f"{FEW_STEPS} steps": lambda: generated(model, prompts, FEW_STEPS, guidance),
        f"{FEW_STEPS} steps, no guidance": lambda: generated(model, prompts, FEW_STEPS, 0.0),
    }
    quality = {}
    for label, make in track(list(sets.items()), "comparing with real images"):
        images = make()
        quality[label] = score(images, prompts) | {
            "fd_real": frechet_distance(network(images), features),
            "sharpness": hf_energy(as_float(images)) / hf_energy(as_float(reference)),
        }
    return quality
