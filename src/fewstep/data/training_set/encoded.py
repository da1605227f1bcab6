"""A training set as latents and prompt features, computed once and kept on disk by a fingerprint of what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.atomic import write_tensors
from fewstep.data.training_set.reading import SetImage, TrainingSet
from fewstep.data.trajectories import text_fingerprint, weights_hash
from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.models.fingerprint import path_fingerprint
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.vision_language import open_vision_language_encoder
from fewstep.progress import track


@dataclass(frozen=True)
class Example:
    """One image at one size.

    Attributes:
        latent: [C, ..., H, W], fp32.
        features: [L, D], of its caption, in the text encoder's dtype.
        privileged: likewise, of the image with its caption; None where no method needs it.
    """

    latent: Tensor
    features: Tensor
    caption: str
    privileged: Tensor | None = None


def encode_set(
    images: TrainingSet,
    model: TextToImagePipeline,
    folder: Path,
    resolutions: list[int] | None,
    device: torch.device,
    vision_language: Path | None = None,
) -> list[Example]:
    """The examples of a set, at all resolutions. The autoencoder and the text encoder are on ``device`` while they
    compute, one after the other, and on the CPU afterwards.

    Args:
        folder: of the cached files.
        vision_language: folder of the model that encodes images with their captions; None leaves that out.

    Raises:
        UserError: an image cannot be opened or has a size that the model cannot take, or a caption is too long; or the
            vision-language model cannot be used.
    """
    sized = [(image, size) for image in images.images for size in images.sizes(image, resolutions)]
    for image, (width, height) in sized:
        try:
            model.latent_shape(height, width)
        except UserError as error:
            raise UserError(f"{image.file}: {width}x{height} pixels: {error}; make the set again") from None
    latents = encode_images(sized, model, folder, device)
    texts = list(dict.fromkeys(image.caption for image in images.images))
    features = dict(zip(texts, encode_captions(texts, model, folder, device), strict=True))
    privileged: Sequence[Tensor | None] = [None] * len(sized)
    if vision_language is not None:
        privileged = encode_privileged(sized, model, folder, device, vision_language)
    return [
        Example(latent, features[image.caption], image.caption, seen)
        for (image, _), latent, seen in zip(sized, latents, privileged, strict=True)
    ]


def encode_images(
    sized: Sequence[tuple[SetImage, tuple[int, int]]], model: TextToImagePipeline, folder: Path, device: torch.device
) -> list[Tensor]:
    """The latents of images at sizes (width, height)."""
    digests = {image.file: image.digest() for image, _ in sized}

    def compute() -> Iterator[Tensor]:
        with on_device(model.vae, device), torch.no_grad():
            for image, size in track(sized, "images encoded"):
                pixels = image.pixels(size)[None].to(device, model.vae.dtype)
                yield model.family.encode_images(model.vae, pixels)[0].float().cpu()

    made_from = [weights_hash(model.vae), [[digests[image.file], *size] for image, size in sized]]
    return cached(folder, "latents", made_from, compute)


def encode_captions(
    texts: Sequence[str], model: TextToImagePipeline, folder: Path, device: torch.device
) -> list[Tensor]:
    """The features [L, D] of texts, in the text encoder's dtype."""
    model.encoder.check(texts)

    def compute() -> Iterable[Tensor]:
        with on_device(model.encoder.text_encoder, device):
            return [features.cpu() for features in model.encoder.encode_uncached(texts)]

    return cached(folder, "captions", [text_fingerprint(model.encoder), list(texts)], compute)


def encode_privileged(
    sized: Sequence[tuple[SetImage, tuple[int, int]]],
    model: TextToImagePipeline,
    folder: Path,
    device: torch.device,
    vision_language: Path,
) -> list[Tensor]:
    """The features [L, D] of images with their captions, of a vision-language model with the text encoder's weights."""

    def compute() -> Iterator[Tensor]:
        encoder = open_vision_language_encoder(vision_language, model.encoder)
        with on_device(encoder, device):
            for image, size in track(sized, "images described"):
                yield encoder(image.pixels(size), image.caption).cpu()

    images = [[image.digest(), image.caption, *size] for image, size in sized]
    made_from = [text_fingerprint(model.encoder), path_fingerprint(vision_language), images]
    return cached(folder, "privileged", made_from, compute)


def cached(folder: Path, what: str, made_from: object, compute: Callable[[], Iterable[Tensor]]) -> list[Tensor]:
    """Tensors from the file that is named after ``made_from``; where there is none, they are computed and written."""
    key = hashlib.blake2b(json.dumps(made_from).encode(), digest_size=8).hexdigest()
    file = folder / f"{what}-{key}.safetensors"
    if not file.exists():
        write_tensors(file, {f"{index:06d}": tensor for index, tensor in enumerate(compute())})
    with reading(file, "delete it"):
        found: Mapping[str, Tensor] = load_file(file)
    return [found[name] for name in sorted(found)]


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the module is on ``device``; afterwards on the CPU."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")
