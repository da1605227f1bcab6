"""Batches of noise and encoded prompts, without images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.core.method import BatchSource, Shard
from fewstep.core.seeds import generator, noise_rows
from fewstep.data.batch import DistillBatch
from fewstep.data.text_prompts import encodable
from fewstep.models.pipeline import TextToImagePipeline


def prompt_batches(model: TextToImagePipeline, prompts: Sequence[str], size: int, seed: int) -> BatchSource:
    """Batches of ``size`` prompts and pure noise. Prompts that are not encoded yet are encoded here, each once.

    Raises:
        UserError: as for :func:`encodable`.
    """
    texts = encodable(model, prompts).stored()
    shape = model.latent_shape(model.generation_config.height, model.generation_config.width)

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        rows = shard.rows(size)
        chosen = torch.randint(len(texts), (size,), generator=generator("prompts", seed, position))[rows].tolist()
        noise = noise_rows(rows, shape, "noise", seed, position)
        return DistillBatch(
            noise.to(model.device), texts.encoded(chosen).to(model.device), texts=[texts[row] for row in chosen]
        )

    return source
