"""Images edited by instruction ("make the sky pink"), by a model that was trained for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.core.samplers import SamplerStep
from fewstep.errors import UserError
from fewstep.inference.edit_input import open_image
from fewstep.inference.generate import (
    Callback,
    GeneratedBatch,
    GenerationResult,
    count_evaluations,
    report_step,
    warn_if_not_finite,
)
from fewstep.inference.params import SamplingParams
from fewstep.machine import reading
from fewstep.models.editor import EditingFamily, ImageEditor
from fewstep.models.frames import check_one_frame

#: Sampling parameters that diffusers' pipeline has no place for.
_WITHOUT_EFFECT = ("auto_steps", "system_prompt", "assistant_prefix", "strength", "adapters", "cache")


def read_images(files: Sequence[str], family: EditingFamily) -> list[Image.Image]:
    """Images to edit, in RGB. Raises: UserError for too many, one that cannot be read, or one of a bad size."""
    check_count(len(files), family)
    images = []
    for file in files:
        with reading(file):
            content = Path(file).expanduser().read_bytes()
        images.append(open_image(file, content).convert("RGB"))
        family.check_image(file, images[-1])
    return images


def check_count(count: int, family: EditingFamily) -> None:
    """Raises: UserError for a number of images that an edit cannot have."""
    if not 1 <= count <= family.max_images:
        raise UserError(f"{count} images to edit: give 1 to {family.max_images}")


def check_supported(params: SamplingParams) -> None:
    """Raises: UserError for parameters that would have no effect on an edit by instruction."""
    for name in _WITHOUT_EFFECT:
        if getattr(params, name):
            raise UserError(f"{name}: has no effect on an edit by instruction; leave it out")
    if params.sampler == "sde":
        raise UserError("sampler sde: edits by instruction are sampled with euler; set sampler to euler")


def edit_images(
    editor: ImageEditor,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    params: SamplingParams | None = None,
    callback: Callback | None = None,
) -> GenerationResult:
    """Edit images by instruction, one result for each prompt: that of the model's own pipeline in diffusers, with noise
    from ``torch.Generator("cpu").manual_seed(seed)``.

    Args:
        images: all of them are shown to the model with each prompt, the last one right before it. Those of more than
            1024 x 1024 pixels are made smaller by the pipeline, to the area of the result.
        params: unset, the model's defaults; without width and height the result is as large as the last image, but at
            most 1024 x 1024 pixels, and its sides are rounded down to multiples of the patch.
        callback: called after every step of every result.

    Raises:
        UserError: no prompts, one that is too long, a number of images or one of a size that the model does not take,
            or parameters without effect.
        GenerationCancelled: ``callback`` cancelled.
    """
    batches = list(edit_batches(editor, prompts, images, params, callback))
    return GenerationResult(
        torch.cat([batch.images for batch in batches]), batches[0].nfe, sum(batch.seconds for batch in batches)
    )


@torch.no_grad()
def edit_batches(
    editor: ImageEditor,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    params: SamplingParams | None = None,
    callback: Callback | None = None,
) -> Iterator[GeneratedBatch]:
    """The images of :func:`edit_images`, one by one as they are made; with the same arguments and errors."""
    if not prompts:
        raise UserError("no prompts: give at least one")
    check_count(len(images), editor.family)
    for number, image in enumerate(images, start=1):
        editor.family.check_image(f"image {number}", image)
    resolved = with_size(params or SamplingParams(), images[-1], editor).resolved(editor.generation_config)
    check_supported(resolved)
    seeds = resolved.image_seeds(len(prompts))
    check_one_frame(resolved.frames, "an edit by instruction")
    shape = editor.latent_shape(resolved.height, resolved.width)
    for prompt in (*prompts, resolved.negative_prompt):
        editor.family.check_instruction(editor.components, prompt)
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        start = time.perf_counter()
        noise = torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)).to(editor.device)
        steps = _Steps(editor.sigmas(resolved.steps), noise, index, callback)
        made = editor.pipeline(
            image=list(images),
            prompt=prompt,
            negative_prompt=resolved.negative_prompt,
            latents=noise,
            sigmas=_pipeline_sigmas(editor, resolved.steps),
            num_inference_steps=resolved.steps,
            height=resolved.height,
            width=resolved.width,
            guidance_scale=resolved.guidance_scale,
            cfg_normalization=resolved.cfg_normalization,
            cfg_truncation=resolved.cfg_truncation,
            callback_on_step_end=steps,
        ).images[0]
        warn_if_not_finite(steps.x, slice(index, index + 1))
        seconds, nfe = time.perf_counter() - start, count_evaluations(resolved, steps.sigmas)
        yield GeneratedBatch(
            range(index, index + 1), torch.from_numpy(np.array(made))[None], nfe, seconds, resolved.steps
        )


def with_size(params: SamplingParams, image: Image.Image, editor: ImageEditor) -> SamplingParams:
    """Parameters whose size is that of the image where it is open."""
    width, height = editor.family.default_size(image, editor.latent_multiple)
    return params.model_copy(update={"width": params.width or width, "height": params.height or height})


def _pipeline_sigmas(editor: ImageEditor, steps: int) -> list[float] | None:
    """The noise levels as the pipeline takes them, without the terminal 0; None are its own, from 1 to 1 / steps.

    Its scheduler would shift the model's own levels, which are shifted already."""
    own = editor.generation_config.sigmas
    stored = own is not None and len(own) == steps + 1
    editor.pipeline.scheduler.set_shift(1.0 if stored else editor.family.shift(editor.components))
    return own[:-1] if own is not None and stored else None


class _Steps:
    """Calls back after each step of the pipeline, with what a sampler of fewstep's would report."""

    def __init__(self, sigmas: Sequence[float], noise: Tensor, image: int, callback: Callback | None) -> None:
        self.sigmas, self.x, self.image, self.callback = sigmas, noise, image, callback

    def __call__(self, pipeline: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Raises: GenerationCancelled."""
        x, self.x = self.x, tensors["latents"]
        if self.callback is not None:
            sigma, sigma_next = self.sigmas[index : index + 2]
            velocity = (x - self.x) / (sigma - sigma_next)  # of an Euler step
            step = SamplerStep(index, sigma, sigma_next, x, velocity, self.x, self.x, 0.0, None)
            report_step(self.callback, slice(self.image, self.image + 1), step, len(self.sigmas) - 1)
        return {}
