"""Batches of a training set: images of one size, with dropped captions; every image once in each epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource, Shard
from fewstep.core.seeds import generator, noise_rows
from fewstep.data.batch import DistillBatch
from fewstep.data.training_set.encoded import Example


def epoch_batches(shapes: Sequence[torch.Size], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The examples of each batch of an epoch, by number: a shuffled order in which a batch has one shape.

    The last batch of a shape begins again with the first examples of its order, so that all batches are whole.
    """
    stream = generator("epoch", seed, epoch)
    buckets: dict[torch.Size, list[int]] = {}
    for number in torch.randperm(len(shapes), generator=stream).tolist():
        buckets.setdefault(shapes[number], []).append(number)
    batches = [
        [numbers[(start + i) % len(numbers)] for i in range(size)]
        for numbers in buckets.values()
        for start in range(0, len(numbers), size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=stream).tolist()]


def example_batches(
    examples: Sequence[Example], null: Tensor, size: int, seed: int, dropout: float, device: torch.device
) -> BatchSource:
    """A source of batches; ``real`` has the latents.

    Args:
        null: features [L, D] of the null prompt.
        dropout: fraction of captions that it replaces.
    """
    shapes = [example.latent.shape for example in examples]
    epoch_order = lru_cache(maxsize=2)(lambda epoch: epoch_batches(shapes, size, seed, epoch))
    per_epoch = len(epoch_order(0))

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        rows = shard.rows(size)
        epoch, index = divmod(position, per_epoch)
        own = [examples[number] for number in epoch_order(epoch)[index][rows]]
        dropped = torch.rand(size, generator=generator("dropout", seed, position))[rows] < dropout
        features = [null if drop else one.features for one, drop in zip(own, dropped.tolist(), strict=True)]
        seen = [one.privileged for one in own if one.privileged is not None]
        return DistillBatch(
            noise_rows(rows, own[0].latent.shape, "noise", seed, position).to(device),
            EncodedPrompts.pad(features).to(device),
            torch.stack([one.latent for one in own])[:, None].to(device),
            ["" if drop else one.caption for one, drop in zip(own, dropped.tolist(), strict=True)],
            EncodedPrompts.pad(seen).to(device) if seen else None,
        )

    return source


def alternating_batches(images: BatchSource, preserved: BatchSource, fraction: float) -> BatchSource:
    """The batches of two sources in turn, each in its own order; whole ones, as images may differ in size.

    Args:
        fraction: of batches of ``preserved``, in (0, 1).
    """

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        before = math.floor(position * fraction)
        if math.floor((position + 1) * fraction) > before:
            return preserved(before, shard)
        return images(position - before, shard)

    return source
