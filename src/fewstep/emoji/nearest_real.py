"""The scorer "nearest_real": whether the real emoji nearest to an image, by features, is of the prompt's object.

The features come from a network that was trained elsewhere. Blur changes them, so that this score falls for soft images
where the emoji classifier's accuracy does not. The gallery is every core object in both teacher styles, centered, on
each background. Its features are bundled (``fewstep emoji gallery`` computes them).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.emoji.dataset import ASSETS, BACKGROUNDS, TEACHER_STYLES, EmojiDataset, EmojiSpec
from fewstep.errors import UserError
from fewstep.evaluation.feature_networks import FeatureNetwork, open_features

GALLERY = ASSETS / "gallery.safetensors"


def gallery_specs(dataset: EmojiDataset, background: str) -> list[EmojiSpec]:
    """The gallery's drawings on a background: every object, style by style."""
    return [EmojiSpec(item.index, style, background, "en") for style in TEACHER_STYLES for item in dataset.objects]


def compute_gallery(dataset: EmojiDataset, background: str, network: FeatureNetwork) -> Tensor:
    """Features [styles x objects, D] of the gallery on a background."""
    return network(dataset.render(gallery_specs(dataset, background), jitter=False))


def write_gallery(file: Path, dataset: EmojiDataset, network: FeatureNetwork) -> None:
    """Write the gallery's features on every background, fp16, with the objects' codes."""
    features = {background: compute_gallery(dataset, background, network).half() for background in BACKGROUNDS}
    write_tensors(file, features, {"network": network.name, "objects": _codes(dataset)})


class NearestReal:
    """Object accuracy by the nearest real emoji. It is never a reward.

    Args:
        gallery: file of the gallery's features; None is the bundled one.

    Raises:
        UserError: the file cannot be read, or is of another dataset or network.
    """

    name = "nearest_real"

    def __init__(self, gallery: str | Path | None = None) -> None:
        self.dataset = EmojiDataset.load()
        file = Path(gallery) if gallery is not None else GALLERY
        try:
            with safe_open(file, "pt") as opened:
                self.gallery = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
                metadata = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read ({error}); make it with `fewstep emoji gallery`") from None
        self.network_name = metadata.get("network", "")
        if metadata.get("objects") != _codes(self.dataset) or self.gallery.keys() != BACKGROUNDS.keys():
            raise UserError(f"{file}: is of another dataset; make it with `fewstep emoji gallery`")

    @cached_property
    def network(self) -> FeatureNetwork:
        """The network of the gallery, opened when a prompt of the dataset is scored."""
        return open_features(self.network_name)

    def similarities(self, images: Tensor, backgrounds: Sequence[str]) -> Tensor:
        """The similarity of each image to each object, [N, objects]: the largest cosine of features, minus the mean of
        the gallery, with the object's drawings on the same background.

        Args:
            images: uint8 [N, H, W, 3].
            backgrounds: each prompt's background.
        """
        features = self.network(images)
        found = torch.empty(len(images), len(self.dataset.objects))
        for background in set(backgrounds):
            rows = [row for row, each in enumerate(backgrounds) if each == background]
            real = self.gallery[background]
            mean = real.mean(0)
            cosine = F.normalize(features[rows] - mean, dim=1) @ F.normalize(real - mean, dim=1).T
            found[rows] = cosine.unflatten(1, (-1, len(self.dataset.objects))).amax(dim=1)
        return found

    def nearest(self, images: Tensor, backgrounds: Sequence[str]) -> Tensor:
        """The index [N] of the object that is nearest to each image; arguments as for :meth:`similarities`."""
        return self.similarities(images, backgrounds).argmax(dim=1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """nearest_real_acc, float [N]: 1 where the nearest real emoji is of the prompt's object, NaN where the prompt
        is not of the dataset.

        Args:
            images: uint8 [N, H, W, 3].
        """
        parsed = {row: spec for row, prompt in enumerate(prompts) if (spec := self.dataset.parse(prompt)) is not None}
        scores = torch.full((len(prompts),), float("nan"))
        if parsed:
            nearest = self.nearest(images[list(parsed)], [spec.background for spec in parsed.values()])
            objects = torch.tensor([spec.object for spec in parsed.values()])
            scores[list(parsed)] = (nearest == objects).float()
        return {"nearest_real_acc": scores}

    def group(self, prompt: str) -> str | None:
        """ "en" or "zh", or None where the prompt is not of the dataset."""
        return self.dataset.language(prompt)


def _codes(dataset: EmojiDataset) -> str:
    return " ".join(item.code for item in dataset.objects)
