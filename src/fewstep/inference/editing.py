"""Images made from images: image to image, and inpainting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core import flow
from fewstep.core.samplers import SamplerStep
from fewstep.errors import UserError
from fewstep.inference.edit_input import EditInput
from fewstep.models.pipeline import TextToImagePipeline

STRENGTH = 0.8  # of an edit, unless given

#: x and noise levels -> the steps of a sampler.
Sample = Callable[[Tensor, Sequence[float]], Iterator[SamplerStep]]


@dataclass(frozen=True)
class SourceImages:
    """What images begin from, one for each prompt.

    Attributes:
        latents: [N, *latent_shape], of the encoded images.
        mask: [N, 1, h, w] at the latents' size, 1 where the image is drawn anew and 0 where it is kept; None draws all
            of it.
    """

    latents: Tensor
    mask: Tensor | None = None

    def __getitem__(self, part: slice) -> SourceImages:
        return SourceImages(self.latents[part], None if self.mask is None else self.mask[part])

    def repeat(self, count: int) -> SourceImages:
        """Of a single image: the source of ``count`` images."""
        mask = None if self.mask is None else self.mask.expand(count, -1, -1, -1)
        return SourceImages(self.latents.expand(count, *self.latents.shape[1:]), mask)


@torch.no_grad()
def encode_source(pipeline: TextToImagePipeline, images: Tensor, masks: Tensor | None = None) -> SourceImages:
    """Encode images one by one.

    Args:
        images: [N, 3, H, W] in [0, 1], of sides that the model takes.
        masks: [N, 1, H, W] in [0, 1]; from 0.5 on, the image is drawn anew. A latent pixel is drawn anew where any of
            its pixels is.

    Raises:
        UserError: a side that the model cannot take.
    """
    pipeline.latent_shape(*images.shape[-2:])
    latents = torch.cat([pipeline.encode_images(image.to(pipeline.device)) for image in images.split(1)])
    if masks is None:
        return SourceImages(latents)
    small = F.adaptive_max_pool2d((masks >= 0.5).float(), latents.shape[-2:])
    return SourceImages(latents, small.to(latents))


def encode_edits(pipeline: TextToImagePipeline, edits: Sequence[EditInput]) -> SourceImages:
    """Encode the images of edits of one size, all of them with a mask or none. Errors as for :func:`encode_source`."""
    masks = [edit.mask for edit in edits if edit.mask is not None]
    return encode_source(pipeline, torch.stack([edit.image for edit in edits]), torch.stack(masks) if masks else None)


def first_step(steps: int, strength: float) -> int:
    """How many of the steps are left out, as diffusers counts them: at strength 1 none, and the image begins as noise.

    Raises:
        UserError: none would be left.
    """
    first = int(max(steps - min(steps * strength, steps), 0))
    if first >= steps:
        raise UserError(f"strength {strength:g}: none of the {steps} steps is left; take at least {1 / steps:g}")
    return first


def edit(
    source: SourceImages, noise: Tensor, sigmas: Sequence[float], first: int, sample: Sample
) -> Iterator[SamplerStep]:
    """Sample from the source's own state at a level of the model's schedule (SDEdit, arXiv 2108.01073). Where a mask
    keeps the image, each step leads to the source's state at the next level with the same noise (as diffusers'
    ``ZImageInpaintPipeline``).

    Args:
        noise: [B, *latent_shape].
        sigmas: of all steps.
        first: steps that are left out.
        sample: the sampler.
    """
    x = flow.add_noise(source.latents, sigmas[first], noise)
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas[first:])):
        made = replace(next(sample(x, [sigma, sigma_next])), index=index)
        if source.mask is not None:
            kept = flow.add_noise(source.latents, sigma_next, noise)
            made = replace(made, x_next=torch.where(source.mask > 0, made.x_next, kept))
        x = made.x_next
        yield made
