"""Batches of noise and encoded prompts, without images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource, Shard
from fewstep.core.seeds import generator, noise_rows
from fewstep.data.batch import DistillBatch
from fewstep.data.encodable_texts import EncodableTexts
from fewstep.data.prompt_stream import PromptStream, TrainingPrompts
from fewstep.data.step_depth import StepDepth
from fewstep.data.stream_batches import StreamBatches
from fewstep.data.text_prompts import TextPrompts, encodable
from fewstep.models.pipeline import TextToImagePipeline


def prompt_batches(
    model: TextToImagePipeline,
    prompts: TrainingPrompts,
    size: int,
    seed: int,
    batches: int | None = None,
    depth: Callable[[EncodableTexts], StepDepth] | None = None,
) -> BatchSource:
    """Batches of ``size`` prompts and pure noise. Prompts of a list that are not encoded yet are encoded here, each
    once; a stream's are encoded as they come.

    Args:
        batches: about how many are used; None is any number. Where these have fewer prompts than there are, a CPU
            encodes only theirs here, and others when they are needed. Other devices encode all, as they have no memory
            for the text encoder beside the training.
        depth: chooses each batch's prompts by the number of steps that they need; unset, all are drawn alike.

    Raises:
        UserError: as for :func:`encodable`.
    """
    if isinstance(prompts, PromptStream):
        return StreamBatches(model, prompts, size, seed)
    texts = encodable(model, prompts)
    shape = model.latent_shape(*model.generation_config.size)

    if depth is not None:
        texts = texts.stored()
    made = None if depth is None else depth(texts)

    def numbers(position: int) -> list[int]:
        if made is not None:
            return made.rows(position, size, seed)
        return torch.randint(len(texts), (size,), generator=generator("prompts", seed, position)).tolist()

    by_need = made is None and isinstance(texts, TextPrompts) and model.device.type == "cpu"
    if batches is not None and by_need and batches * size < len(texts):
        encoded = _encoded_part(texts, {row for position in range(batches) for row in numbers(position)})
    else:
        encoded = texts.stored().encoded

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        rows = shard.rows(size)
        chosen = numbers(position)[rows]
        noise = noise_rows(rows, shape, "noise", seed, position)
        return DistillBatch(
            noise.to(model.device),
            encoded(chosen).to(model.device),
            texts=[texts[row] for row in chosen],
            steps=None if made is None else made.steps(position, seed),
        )

    return source


def _encoded_part(texts: EncodableTexts, rows: set[int]) -> Callable[[Sequence[int]], EncodedPrompts]:
    """``texts.encoded``, with these rows encoded beforehand."""
    ordered = sorted(rows)
    place = {row: index for index, row in enumerate(ordered)}
    stored = texts.select(ordered).stored()

    def encoded(chosen: Sequence[int]) -> EncodedPrompts:
        if all(row in place for row in chosen):
            return stored.encoded([place[row] for row in chosen])
        return texts.encoded(chosen)

    return encoded
