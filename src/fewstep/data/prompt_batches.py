"""Batches of noise and encoded prompts, without images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource, Shard
from fewstep.core.seeds import generator, noise_rows
from fewstep.data.batch import DistillBatch
from fewstep.data.prompt_shards import PromptShards
from fewstep.data.trajectories import text_fingerprint
from fewstep.models.pipeline import TextToImagePipeline


def prompt_batches(model: TextToImagePipeline, prompts: Sequence[str], size: int, seed: int) -> BatchSource:
    """Batches of ``size`` prompts and pure noise. Each prompt is encoded once, here, or was encoded to disk before.

    Raises:
        UserError: prompts on disk were encoded by another text encoder.
    """
    encoded: PromptShards | EncodedPrompts = prompts if isinstance(prompts, PromptShards) else model.encode(prompts)
    if isinstance(encoded, PromptShards):
        encoded.check(text_fingerprint(model.encoder))
    shape = model.latent_shape(model.generation_config.height, model.generation_config.width)

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        rows = shard.rows(size)
        chosen = torch.randint(len(prompts), (size,), generator=generator("prompts", seed, position))[rows]
        noise = noise_rows(rows, shape, "noise", seed, position)
        own = encoded.encoded(chosen.tolist()) if isinstance(encoded, PromptShards) else encoded[chosen]
        return DistillBatch(noise.to(model.device), own.to(model.device))

    return source
