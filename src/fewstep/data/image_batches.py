"""Batches of real images as latents, from an image source."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.core.method import BatchSource, Shard
from fewstep.core.registry import image_sources
from fewstep.core.seeds import generator, noise_rows
from fewstep.data.batch import DistillBatch
from fewstep.data.text_prompts import encodable
from fewstep.errors import UserError
from fewstep.models.frames import check_one_frame
from fewstep.models.pipeline import TextToImagePipeline


def rendered_image_batches(
    source_name: str, model: TextToImagePipeline, prompts: Sequence[str], count: int, size: int, seed: int
) -> BatchSource:
    """Batches of ``size`` out of ``count`` real images of random prompts, encoded by the model's autoencoder.

    Raises:
        UserError: no such image source, or a prompt that it has no image of.
    """
    check_one_frame(model.generation_config.frames, f"method.real_source={source_name}")
    images_of = image_sources.get(source_name)()
    stream = generator("real images", seed)
    numbers = torch.randint(len(prompts), (count,), generator=stream).tolist()
    chosen = [prompts[i] for i in numbers]
    for prompt in chosen:
        if not images_of.knows(prompt):
            raise UserError(
                f"method.real_source={source_name}: it has no image of {prompt!r}; set method.real_source=teacher"
            )
    images = images_of.render(chosen, stream, model.generation_config.height)
    latents = torch.cat([model.encode_images(part.to(model.device)) for part in images.split(128)]).cpu()
    texts = encodable(model, prompts).select(numbers).stored()

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        rows = shard.rows(size)
        own = torch.randint(count, (size,), generator=generator("images", seed, position))[rows]
        noise = noise_rows(rows, latents.shape[1:], "noise", seed, position)
        return DistillBatch(
            noise.to(model.device),
            texts.encoded(own.tolist()).to(model.device),
            latents[own, None].to(model.device),
            [chosen[row] for row in own.tolist()],
        )

    return source
