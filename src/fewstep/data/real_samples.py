"""Real samples in WebDataset shards: a prompt with a latent or an image, checked and decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.data.prompt_tar import TEXTS, sample_prompts
from fewstep.data.tar_samples import read_samples
from fewstep.data.training_set.buckets import crop_to
from fewstep.data.training_set.opening import Unreadable, open_rgb
from fewstep.errors import UserError
from fewstep.machine import reason

LATENTS = ("npy", "safetensors")
IMAGES = ("png", "jpg", "jpeg", "webp")
_KINDS = (*LATENTS, *IMAGES)  # the first of these that a sample has is read


@dataclass(frozen=True)
class StoredSample:
    """A sample as it is in its shard.

    Attributes:
        key: the names of its shard and of the sample.
        where: likewise with the shard's folder, for messages.
        kind: one of ``LATENTS`` or ``IMAGES``.
        content: of that member.
    """

    key: str
    where: str
    text: str
    kind: str
    content: bytes


@dataclass(frozen=True)
class RealSample:
    """A decoded sample: one of the two.

    Attributes:
        latent: [C, ..., H, W], fp32.
        pixels: uint8 [3, height, width].
    """

    text: str
    latent: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True)
class SampleFormat:
    """What the samples of a model are decoded to.

    Attributes:
        latent_shape: without the batch.
        height, width: in pixels.
        frames: of a video; 1 is an image.
    """

    latent_shape: tuple[int, ...]
    height: int
    width: int
    frames: int = 1

    def decode(self, sample: StoredSample) -> RealSample:
        """Raises: UserError that names the sample: it is damaged, or does not fit the model."""
        name = f"{sample.where}, .{sample.kind}"
        if sample.kind in LATENTS:
            read = _read_npy if sample.kind == "npy" else _read_safetensors
            return RealSample(sample.text, latent=self._checked(read(sample.content, name), name))
        if self.frames > 1:
            raise UserError(f"{name}: an image, where the model makes videos of {self.frames} frames; give latents")
        try:
            image = open_rgb(io.BytesIO(sample.content))
        except Unreadable as error:
            raise UserError(f"{name}: cannot be opened ({error}); write the image again, or leave it out") from None
        size = self.width, self.height
        image = image if image.size == size else crop_to(image, size)
        return RealSample(sample.text, pixels=torch.from_numpy(np.array(image)).permute(2, 0, 1))

    def _checked(self, latent: Tensor, name: str) -> Tensor:
        if latent.shape != self.latent_shape:
            sides = f"{self.width}x{self.height}" + (f" and {self.frames} frames" if self.frames > 1 else "")
            raise UserError(
                f"{name}: a latent of shape {list(latent.shape)}, where the model's has {list(self.latent_shape)} at "
                f"{sides}; encode the images with this model at this size, or set resolution"
            )
        if not latent.isfinite().all():
            raise UserError(f"{name}: a latent with values that are not finite; encode the image again in fp32")
        return latent


def shard_rows(files: Sequence[str], column: str) -> Iterator[dict[str, object]]:
    """The samples of shards, still encoded: the fields of :class:`StoredSample`, but ``texts``, a list of prompts.

    Raises:
        UserError: a shard is damaged, or a sample has no prompt, or neither a latent nor an image.
    """
    for file in files:
        path = Path(file)
        for sample in read_samples(path, (*TEXTS, *_KINDS)):
            kind = next((name for name in _KINDS if name in sample.members), None)
            if kind is None:
                expected = ", ".join(f".{name}" for name in _KINDS)
                raise UserError(f"{sample.where}: no latent and no image; it needs a member of {expected}")
            if not any(name in sample.members for name in TEXTS):
                raise UserError(f"{sample.where}: no prompt; it needs a .txt member, or a .json member that has it")
            yield {
                "key": f"{path.name} {sample.key}",
                "where": sample.where,
                "texts": sample_prompts(sample, column),
                "kind": kind,
                "content": sample.members[kind],
            }


def _read_npy(content: bytes, name: str) -> Tensor:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise _damaged(name, error) from None
    if array.dtype.kind != "f":
        raise _not_floating(name, array.dtype)
    return torch.from_numpy(array.astype(np.float32))


def _read_safetensors(content: bytes, name: str) -> Tensor:
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(name, error) from None
    if len(tensors) != 1:
        raise UserError(f"{name}: {len(tensors)} tensors, where one latent is expected")
    latent = next(iter(tensors.values()))
    if not latent.is_floating_point():
        raise _not_floating(name, latent.dtype)
    return latent.float()


def _damaged(name: str, error: Exception) -> UserError:
    return UserError(f"{name}: cannot be read ({reason(error)}); write the latent again")


def _not_floating(name: str, dtype: object) -> UserError:
    return UserError(f"{name}: a latent of dtype {dtype}; write it in fp16, bf16 (.safetensors) or fp32")
