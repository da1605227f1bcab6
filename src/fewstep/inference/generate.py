"""Images from prompts, with what the model's card says wherever the caller says nothing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.denoiser import Denoiser
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.samplers import sample_euler, sample_sde
from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import TextToImagePipeline

SAMPLERS = ("euler", "renoise")
MAX_PIXELS_PER_BATCH = 2**21  # pixels that the transformer draws together, two images of 1024 x 1024
MAX_DECODE_PIXELS = 2**20  # pixels that the autoencoder decodes together: it takes far more memory for each


@dataclass
class GenerationResult:
    """Images and what they cost.

    Attributes:
        images: uint8 [N, H, W, 3].
        nfe: runs of the transformer; guidance takes two a step.
        seconds: wall time of sampling and decoding together, prompts already encoded.
    """

    images: Tensor
    nfe: int
    seconds: float


@torch.no_grad()
def generate(
    model: TextToImagePipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    system_prompt: str | None = None,
    assistant_prefix: str = "",
    cfg_normalization: float = 0.0,
    cfg_truncation: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> GenerationResult:
    """Generate one image a prompt.

    Args:
        seed: image i starts from seed ``seed + i``, unless ``seeds`` gives each its own.
        steps, guidance_scale, height, width, sampler, eta: unset, the model's card decides. ``guidance_scale`` is
            diffusers': ``cond + g (cond - null)``, 0 is none; ``eta`` in [0, 1] is the renoise sampler's share of fresh
            noise.
        negative_prompt: what guidance leads away from.
        system_prompt: the system's turn before every prompt; unset, the card's.
        assistant_prefix: what the text encoder is to have thought of the prompts already.
        cfg_normalization: the guided velocity's norm is at most so many times the unguided one's; 0 leaves it.
        cfg_truncation: no guidance where ``1 - sigma`` is larger. Both, and the negative prompt, are as in diffusers'
            pipeline.
        batch_size: images that are drawn together; unset, as many as have two million pixels, 64 at most.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: no prompts, an unknown sampler, a size the model cannot take, or guidance asked of a
            guidance-distilled model.
    """
    card = model.generation_config
    steps = card.steps if steps is None else steps
    guidance = card.guidance_scale if guidance_scale is None else guidance_scale
    sampler = card.sampler if sampler is None else sampler
    eta = card.eta if eta is None else eta
    height, width = height or card.height, width or card.width
    _check(model, prompts, steps, guidance, sampler, eta)
    if cfg_normalization < 0 or not 0 <= cfg_truncation <= 1:
        raise UserError("cfg_normalization cannot be negative, and cfg_truncation is a share from 0 to 1")
    if guidance == 0 and (negative_prompt or cfg_normalization or cfg_truncation < 1):
        warnings.warn("without guidance, what is said of it changes nothing: give a guidance_scale", stacklevel=2)
    seeds = [seed + i for i in range(len(prompts))] if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt")

    encoded = model.encode(prompts, system=system_prompt, assistant_prefix=assistant_prefix)
    denoiser: Denoiser = model.denoiser
    if guidance > 0:
        null = model.encode([negative_prompt], system=system_prompt)
        denoiser = ClassifierFreeGuidance(model.denoiser, null, guidance + 1, cfg_normalization, cfg_truncation)
    sigmas = model.sigmas(steps)
    guided_steps = sum(1 - sigma <= cfg_truncation for sigma in sigmas) if guidance > 0 else 0
    images = []
    start = time.perf_counter()
    for part in batched(len(prompts), batch_size or max_batch_size(height, width)):
        noise = initial_noise(model, seeds[part], height, width)
        with model.denoiser.cache_text_tokens():
            if sampler == "renoise":
                fresh = _NoiseStreams(seeds[part])
                latents = sample_sde(denoiser, noise, sigmas, encoded[part], noise=fresh, eta=eta)
            else:
                latents = sample_euler(denoiser, noise, sigmas, encoded[part])
        for some in batched(len(latents), max(1, MAX_DECODE_PIXELS // (height * width))):
            images.append(to_uint8(model.decode(latents[some])).cpu())
            if progress is not None:
                progress(len(images[-1]))
    seconds = time.perf_counter() - start
    return GenerationResult(torch.cat(images), steps + guided_steps, seconds)


def max_batch_size(height: int, width: int) -> int:
    """How many images of so many pixels are drawn together, where nobody says."""
    return max(1, min(64, MAX_PIXELS_PER_BATCH // (height * width)))


def batched(count: int, size: int) -> list[slice]:
    """``count`` things in order, ``size`` of them at a time."""
    return [slice(first, first + size) for first in range(0, count, size)]


def _check(
    model: TextToImagePipeline, prompts: Sequence[str], steps: int, guidance: float, sampler: str, eta: float
) -> None:
    if not prompts:
        raise UserError("no prompts: give at least one")
    if steps < 1:
        raise UserError(f"steps {steps}: at least 1 is needed")
    if guidance < 0:
        raise UserError(f"guidance_scale {guidance}: it cannot be negative; 0 is none")
    if sampler not in SAMPLERS:
        raise UserError(f"sampler {sampler!r} is not known; there are: {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta}: a share of fresh noise, from 0 to 1")
    card = model.generation_config
    if card.guidance_distilled and guidance > 0:
        raise UserError(
            f"guidance_scale {guidance}: this model has guidance distilled into it; leave it out, or give 0"
        )
    if card.guidance_distilled and steps != card.steps:
        warnings.warn(f"this model was trained for {card.steps} steps, not {steps}: expect worse images", stacklevel=3)


class _NoiseStreams:
    """Fresh noise for each image from a stream of its own, so that results do not depend on who shares the batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.streams = [torch.Generator("cpu").manual_seed(seed + 2**32) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        each = [torch.randn(like.shape[1:], generator=stream) for stream in self.streams]
        return torch.stack(each).to(like)
