"""A feature network that keeps the features of recent images: distances and scorers compute them once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fewstep.evaluation.feature_networks import FeatureNetwork
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.images import as_uint8


class RecentFeatures:
    """A feature network; equal images are computed once.

    Args:
        network: computes the features.
        images: how many images' features are kept, those used last.
    """

    def __init__(self, network: FeatureNetwork, images: int = 8192) -> None:
        self.network, self.name, self.images = network, network.name, images
        self.features: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, images: Tensor, progress: Callable[[int], object] | None = None) -> Tensor:
        """Arguments and features as of the network."""
        pixels = as_uint8(images).cpu()
        keys = [_key(image) for image in pixels]
        # one row of each image that is not known
        new = {key: row for row, key in enumerate(keys) if key not in self.features}
        if progress is not None and len(new) < len(keys):
            progress(len(keys) - len(new))
        computed = self.network(pixels[list(new.values())], progress)
        known = dict(zip(new, computed, strict=True))
        found = [known[key] if key in known else self.features[key] for key in keys]
        for key, features in zip(keys, found, strict=True):
            self.features[key] = features
            self.features.move_to_end(key)
        while len(self.features) > self.images:
            self.features.popitem(last=False)
        return torch.stack(found) if found else computed


@cache
def open_nsfw() -> RecentFeatures:
    """The network "open-nsfw", one instance for all users in a process. Errors as for :class:`FeatureNet`."""
    return RecentFeatures(FeatureNet())


def _key(image: Tensor) -> bytes:
    digest = hashlib.blake2b(f"{tuple(image.shape)}".encode(), digest_size=16)
    digest.update(image.contiguous().numpy().data)
    return digest.digest()
