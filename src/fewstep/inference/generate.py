"""Text-to-image generation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fewstep.core.batch_invariance import batch_invariant
from fewstep.core.batching import batched, max_decode_batch_size
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.samplers import SamplerStep, iterate
from fewstep.core.seeds import generator
from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.inference.editing import SourceImages, edit, first_step
from fewstep.inference.params import ResolvedParams, SamplingParams
from fewstep.inference.prompt_parts import PromptParts
from fewstep.inference.step_chooser import chosen_steps
from fewstep.models.adapters import active_adapters
from fewstep.models.frames import check_one_frame
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import TextToImagePipeline


@dataclass
class GenerationResult:
    """Images and their cost.

    Attributes:
        images: uint8 [N, H, W, 3]; videos are [N, F, H, W, 3].
        nfe: evaluations of the transformer for each image; a guided step takes two. The mean where they differ.
        seconds: wall time of sampling and decoding all images, without the encoding of prompts.
    """

    images: Tensor
    nfe: float
    seconds: float


@dataclass(frozen=True)
class GeneratedBatch:
    """The images of some of the prompts.

    Attributes:
        indices: their numbers, in the order of the prompts.
        images: uint8 [B, H, W, 3]; videos are [B, F, H, W, 3].
        nfe: evaluations of the transformer for each image.
        seconds: wall time of sampling and decoding these images.
        steps: of each image.
    """

    indices: Sequence[int]
    images: Tensor
    nfe: int
    seconds: float
    steps: int


@dataclass(frozen=True)
class GenerationStep:
    """What a callback receives after every sampling step of a batch.

    Attributes:
        images: indices of the batch's images, in the order of the prompts.
        step: finished steps of these images, from 1.
        steps: all steps of an image.
        sampler_step: the step itself, with its latents.
    """

    images: Sequence[int]
    step: int
    steps: int
    sampler_step: SamplerStep

    @property
    def finished(self) -> int:
        """Images whose last step this was."""
        return len(self.images) if self.step == self.steps else 0

    @property
    def x0(self) -> Tensor:
        """Latents of the images as predicted at this step, [B, C, ..., H, W]."""
        return self.sampler_step.x0


#: Called after every step. It cancels the generation by returning False or by raising GenerationCancelled.
Callback = Callable[[GenerationStep], object]


class GenerationCancelled(Exception):
    """A callback cancelled the generation. The pipeline is unchanged and can be used again."""


def generate(
    pipeline: TextToImagePipeline,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    callback: Callback | None = None,
    source: SourceImages | None = None,
) -> GenerationResult:
    """Generate one image for each prompt. An image depends on its prompt and seed, not on its batch: to the bit on a
    CPU, but for compiled blocks, and up to rounding on a GPU.

    Args:
        params: unset, the model's defaults.
        callback: called after every step of every batch.
        source: images to begin from, one for each prompt, at ``params.strength``.

    Raises:
        UserError: no prompts, one that cannot be encoded, or parameters that the model cannot take.
        GenerationCancelled: ``callback`` cancelled.
    """
    batches = list(generate_batches(pipeline, prompts, params, callback, source))
    images = torch.cat([batch.images for batch in batches])
    order = torch.tensor([index for batch in batches for index in batch.indices])
    nfe = sum(batch.nfe * len(batch.images) for batch in batches) / len(images)
    same = len({batch.nfe for batch in batches}) == 1
    return GenerationResult(
        images[order.argsort()], batches[0].nfe if same else nfe, sum(batch.seconds for batch in batches)
    )


def generate_batches(
    pipeline: TextToImagePipeline,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    callback: Callback | None = None,
    source: SourceImages | None = None,
) -> Iterator[GeneratedBatch]:
    """The images of :func:`generate`, batch by batch as they are made; with the same arguments and errors. Where the
    number of steps is chosen for each prompt, those of the fewest steps come first."""
    if not prompts:
        raise UserError("no prompts: give at least one")
    params, config = params or SamplingParams(), pipeline.generation_config
    resolved = params.resolved(config)
    if not params.auto_steps:
        yield from _sampled_batches(pipeline, prompts, resolved, callback, source)
        return
    if source is not None:
        raise UserError("steps auto: an image to begin from needs a number of steps")
    seeds = params.image_seeds(len(prompts))
    template = (resolved.system_prompt, resolved.assistant_prefix)
    chosen = chosen_steps(pipeline.folder, pipeline.encoder, prompts, *template)
    for count in sorted(set(chosen)):
        indices = [index for index, steps in enumerate(chosen) if steps == count]
        own = resolved.model_copy(update={"steps": count, "seeds": tuple(seeds[index] for index in indices)})
        moved = None if callback is None else partial(_report_moved, callback, indices)
        for batch in _sampled_batches(pipeline, [prompts[index] for index in indices], own, moved, None):
            yield replace(batch, indices=[indices[row] for row in batch.indices])


def _report_moved(callback: Callback, indices: Sequence[int], step: GenerationStep) -> object:
    """Report a step of some of the prompts, which have these numbers among all."""
    return callback(replace(step, images=[indices[row] for row in step.images]))


@torch.no_grad()
def _sampled_batches(
    pipeline: TextToImagePipeline,
    prompts: Sequence[str],
    resolved: ResolvedParams,
    callback: Callback | None,
    source: SourceImages | None,
) -> Iterator[GeneratedBatch]:
    """The images of prompts with the same number of steps. Arguments as for :func:`generate_batches`."""
    seeds = resolved.image_seeds(len(prompts))
    pipeline.latent_shape(*resolved.size)  # an impossible size is an error before any work
    sigmas = pipeline.sigmas(resolved.steps, (resolved.height, resolved.width))
    if source is not None:
        check_one_frame(resolved.frames, "an edit")
    first = 0 if source is None else first_step(resolved.steps, resolved.strength or 1.0)

    with _adapters(pipeline, resolved.adapters):
        encoded = PromptParts(pipeline, prompts, resolved.system_prompt, resolved.assistant_prefix)
        denoiser = _guided(pipeline, resolved)
        for part in batched(len(prompts), resolved.batch_size):
            own, start = encoded[part], time.perf_counter()
            x = initial_noise(pipeline, seeds[part], *resolved.size)
            with pipeline.denoiser.cache_text_tokens(), pipeline.denoiser.reuse_layers(resolved.layer_reuse):
                sampled = partial(
                    iterate,
                    denoiser,
                    prompts=own,
                    sampler=resolved.sampler,
                    eta=resolved.eta,
                    noise=_PerImageNoise(seeds[part]),
                )
                steps = sampled(x, sigmas) if source is None else edit(source[part], x, sigmas, first, sampled)
                for step in steps:
                    x = step.x_next
                    if callback is not None:
                        report_step(callback, part, step, resolved.steps - first)
            warn_if_not_finite(x, part)
            images = _decode(pipeline, x, resolved)
            seconds = time.perf_counter() - start
            nfe = count_evaluations(resolved, sigmas[first:])
            yield GeneratedBatch(range(part.start, part.stop), images, nfe, seconds, resolved.steps)


def _guided(pipeline: TextToImagePipeline, params: ResolvedParams) -> Denoiser:
    """The pipeline's denoiser, with classifier-free guidance if there is any."""

    def denoiser(x: Tensor, sigma: Tensor, prompts: EncodedPrompts) -> Tensor:
        with batch_invariant(x.device):
            return pipeline.denoiser(x, sigma, prompts)

    if params.guidance_scale == 0:
        return denoiser
    negative = pipeline.encode([params.negative_prompt], system=params.system_prompt)
    return ClassifierFreeGuidance(
        denoiser, negative, params.guidance_scale + 1, params.cfg_normalization, params.cfg_truncation
    )


def _decode(pipeline: TextToImagePipeline, latents: Tensor, params: ResolvedParams) -> Tensor:
    """uint8 [B, H, W, 3], or [B, F, H, W, 3], on the CPU."""
    alone = latents.device.type == "cpu"  # where a batch is no faster, and would change the last bits
    size = 1 if alone else max_decode_batch_size(*params.size)
    return torch.cat([to_uint8(pipeline.decode(latents[some])).cpu() for some in batched(len(latents), size)])


def count_evaluations(params: ResolvedParams, sigmas: Sequence[float]) -> int:
    """Evaluations of the transformer for one image.

    Args:
        sigmas: of its steps, with the terminal 0.
    """
    guided = [sigma for sigma in sigmas[:-1] if 1 - sigma <= params.cfg_truncation]
    return len(sigmas) - 1 + (len(guided) if params.guidance_scale > 0 else 0)


def report_step(callback: Callback, part: slice, step: SamplerStep, steps: int) -> None:
    """Call back after a step of some images. Raises: GenerationCancelled.

    Args:
        steps: of each image.
    """
    images = range(part.start, part.stop)
    if callback(GenerationStep(images, step.index + 1, steps, step)) is False:
        raise GenerationCancelled(f"cancelled after step {step.index + 1} of {steps}")


def warn_if_not_finite(latents: Tensor, part: slice) -> None:
    """An overflow would become a black image without a word."""
    bad = [part.start + row for row, fine in enumerate(latents.isfinite().flatten(1).all(dim=1).tolist()) if not fine]
    if bad:
        others = f", as those of {len(bad) - 1} more" if bad[1:] else ""
        warnings.warn(
            f"image {bad[0]}: its latents are not finite{others}; lower guidance_scale, or take weights in fp32",
            stacklevel=3,
        )


@contextmanager
def _adapters(pipeline: TextToImagePipeline, adapters: Mapping[str, float]) -> Iterator[None]:
    """Inside, these LoRA adapters are active on the transformer. Raises: UserError for an unknown name."""
    with ExitStack() as stack:
        if adapters:
            try:
                stack.enter_context(active_adapters(pipeline.transformer, adapters))
            except ValueError as error:
                raise UserError(f"adapters: {error}") from None
        yield


class _PerImageNoise:
    """Fresh noise from one random stream for each image, so that an image does not depend on its batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [generator("sampler noise", seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        noise = [torch.randn(like.shape[1:], generator=stream) for stream in self.generators]
        return torch.stack(noise).to(like)
