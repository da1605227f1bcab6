"""Latents that a model makes of prompts, as a training set: to undo its distillation, or to keep what it knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.batching import batched, max_batch_size
from fewstep.core.compiler import eager
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.samplers import iterate, last_state
from fewstep.core.seeds import derive_seed
from fewstep.data.training_set.encoded import Example, cached
from fewstep.data.trajectories import weights_hash
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import progress_bar


def own_examples(
    model: TextToImagePipeline, captions: Sequence[str], features: Sequence[Tensor], seed: int, folder: Path
) -> list[Example]:
    """One image of each caption, by the model's own steps and guidance, kept on disk by what made them.

    Args:
        features: [L, D] of each caption.
        folder: of the cached file.
    """
    config = model.generation_config
    height, width, sigmas = config.height, config.width, model.sigmas(config.steps, (config.height, config.width))
    guidance = config.guidance_scale
    denoiser: Denoiser = model.denoiser
    if guidance:
        denoiser = ClassifierFreeGuidance(denoiser, model.encode([""]).to(model.device), 1 + guidance)
    seeds = [derive_seed("own image", seed, index) for index in range(len(captions))]

    @torch.no_grad()
    def compute() -> Iterator[Tensor]:
        with eager(), progress_bar(len(captions), "own images sampled") as advance:
            for part in batched(len(captions), max_batch_size(height, width)):
                prompts = EncodedPrompts.pad(features[part]).to(model.device)
                noise = initial_noise(model, seeds[part], height, width)
                steps = iterate(denoiser, noise, sigmas, prompts, sampler=config.sampler, eta=config.eta)
                yield from last_state(noise, steps).float().cpu()
                advance(len(noise))

    made_from = [weights_hash(model.transformer), sigmas, config.sampler, config.eta, height, width, seed, [*captions]]
    made_from += [guidance] if guidance else []
    latents = cached(folder, "own-images", made_from, compute)
    return [Example(*each) for each in zip(latents, features, captions, strict=True)]
