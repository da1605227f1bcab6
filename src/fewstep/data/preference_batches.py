"""Batches of preference pairs as latents: the images that votes were cast on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.method import BatchSource, Shard
from fewstep.core.seeds import generator
from fewstep.data.images import read_image
from fewstep.data.preferences import PreferencePair, preference_pairs
from fewstep.data.text_prompts import encodable
from fewstep.errors import UserError
from fewstep.models.frames import check_one_frame
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.progress import progress_bar

_ENCODED = 16  # images that are encoded at a time


@dataclass(frozen=True)
class PairBatch:
    """
    winners, losers: [P, C, ..., H, W], latents of the preferred images and of the others.
    prompts: P of them.
    """

    winners: Tensor
    losers: Tensor
    prompts: EncodedPrompts


def preference_batches(
    source: str | Path, voter: str | None, model: TextToImagePipeline, size: int, seed: int
) -> BatchSource:
    """Batches of ``size`` random pairs of a folder of votes. Every image is encoded once, and its latents are kept in
    memory (1 MB for an image of 1024 pixels in 16 channels).

    Args:
        source, voter: as for :func:`fewstep.data.preferences.preference_pairs`.

    Raises:
        UserError: there are no votes with a winner, or an image is missing or has another size than the model's.
    """
    pairs = preference_pairs(source, voter)
    files = list(dict.fromkeys(file for pair in pairs for file in (pair.winner, pair.loser)))
    row = {file: number for number, file in enumerate(files)}
    latents = torch.cat(list(_latents(files, model)))
    winners, losers = (torch.tensor([row[file] for file in each]) for each in zip(*map(_files, pairs), strict=True))
    texts = encodable(model, [pair.prompt for pair in pairs]).stored()

    def batch(position: int, shard: Shard = Shard()) -> PairBatch:  # noqa: B008  # frozen
        rows = shard.rows(size)
        own = torch.randint(len(pairs), (size,), generator=generator("preference pairs", seed, position))[rows]
        prompts = texts.encoded(own.tolist()).to(model.device)
        return PairBatch(latents[winners[own]].to(model.device), latents[losers[own]].to(model.device), prompts)

    return batch


def _files(pair: PreferencePair) -> tuple[Path, Path]:
    return pair.winner, pair.loser


def _latents(files: Sequence[Path], model: TextToImagePipeline) -> Iterator[Tensor]:
    """The images' latents, a few at a time."""
    config = model.generation_config
    check_one_frame(config.frames, "training on preference pairs")
    expected = config.height, config.width
    with progress_bar(len(files), "images of preference pairs encoded") as advance:
        for start in range(0, len(files), _ENCODED):
            images = []
            for file in files[start : start + _ENCODED]:
                image = read_image(file)
                if image.shape[:2] != expected:
                    height, width = image.shape[:2]
                    raise UserError(
                        f"{file}: {height}x{width} pixels, the student's images have {expected[0]}x{expected[1]}; "
                        "collect votes on images of its size, or set resolution"
                    )
                images.append(image)
            pixels = torch.stack(images).permute(0, 3, 1, 2).float() / 255
            yield model.encode_images(pixels.to(model.device)).cpu()
            advance(len(images))
