"""Training sets as ``fewstep lora prepare`` writes them: ``dataset.yaml`` and the images with their captions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.config.load import read_yaml
from fewstep.core.registry import load_plugins, training_sets
from fewstep.data.training_set.buckets import Fit, crop_to, target_size
from fewstep.data.training_set.opening import Unreadable, open_rgb
from fewstep.errors import UserError
from fewstep.machine import reading

INDEX = "dataset.yaml"


@dataclass(frozen=True)
class SetImage:
    """One image of a training set.

    Attributes:
        width, height: in pixels.
    """

    file: Path
    caption: str
    width: int
    height: int

    def digest(self) -> str:
        """A hash of the file's content."""
        with reading(self.file), self.file.open("rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """The image scaled and cropped to (width, height): [3, height, width] in [0, 1]. Raises: UserError."""
        try:
            image = open_rgb(self.file)
        except Unreadable as error:
            raise UserError(f"{self.file}: cannot be opened ({error})") from None
        if image.size != size:
            image = crop_to(image, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class TrainingSet:
    """Images with captions.

    Attributes:
        resolution: pixels of a square crop, or of the longest edge.
        fit: how crops were chosen.
        trigger: the word that its captions have; "" is none.
    """

    images: list[SetImage]
    resolution: int
    fit: Fit
    trigger: str

    def sizes(self, image: SetImage, resolutions: list[int] | None) -> list[tuple[int, int]]:
        """The different sizes (width, height) at which an image is trained; none is larger than the image."""
        if resolutions is None:
            return [(image.width, image.height)]
        return list(dict.fromkeys(target_size(image.width, image.height, side, self.fit) for side in resolutions))


def resolve_training_set(name: str, cache: Path) -> Path:
    """The folder of a training set: a path, or the name of a registered one, which is written into ``cache``."""
    load_plugins()
    folder = Path(name).expanduser()
    if folder.exists() or name not in training_sets:
        return folder
    made = cache / name
    if not made.exists():
        training_sets.get(name)(made)
    return made


def read_training_set(folder: Path) -> TrainingSet:
    """Read the set in a folder, or whose ``dataset.yaml`` is given.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = folder.parent if folder.name == INDEX else folder
    index = folder / INDEX
    if not index.is_file():
        known = ", ".join(training_sets.names())
        raise UserError(
            f"data.images: {folder} is no training set (no {INDEX}); make one: fewstep lora prepare DIR --out SET "
            f"(sets by name: {known})"
        )
    tree = read_yaml(index, "the index of a training set")
    try:
        resolution, fit = int(tree["resolution"]), tree["fit"]
        rows = (folder / str(tree["metadata"])).read_text(encoding="utf-8").splitlines()
        images = [_image(folder, json.loads(row)) for row in rows if row.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: cannot be read ({error}); make the set again with fewstep lora prepare") from None
    if tree.get("kind") != "lora_dataset" or fit not in get_args(Fit):
        raise UserError(f"{index}: no index of a training set; make one with fewstep lora prepare")
    if not images:
        raise UserError(f"{index}: the set has no images")
    missing = next((image.file for image in images if not image.file.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: in the set's metadata, but there is no such file")
    return TrainingSet(images, resolution, fit, str(tree.get("trigger") or ""))


def _image(folder: Path, row: dict[str, object]) -> SetImage:
    width, height = int(str(row["width"])), int(str(row["height"]))
    return SetImage(folder / str(row["file_name"]), str(row["text"]), width, height)
