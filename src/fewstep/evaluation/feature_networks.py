"""Feature networks by name: "open-nsfw", or "clip", "dinov2" and "inception" with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.registry import feature_networks
from fewstep.rewards.specs import open_plugin

DEFAULT = "open-nsfw"  # needs no checkpoint


class FeatureNetwork(Protocol):
    """Images -> features. ``name`` stands beside every figure that is measured with it."""

    name: str

    def __call__(self, images: Tensor, progress: Callable[[int], object] | None = None) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, D] on the CPU; ``progress`` gets the number of images of each batch."""
        ...


def open_features(spec: str = DEFAULT, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The network of a name, or of "name:checkpoint" with a local path or hub id.

    Raises:
        UserError: there is no such network, its checkpoint cannot be loaded, or a package is not installed.
    """
    network: FeatureNetwork = open_plugin(feature_networks, spec, device)
    return network


def with_network(key: str, network: str) -> str:
    """The key of a figure with the network that it is measured with: "fd_teacher[open-nsfw]"."""
    return f"{key}[{network}]"
