"""The frozen features that a preference head scores, of an image and its prompt.

    clip:PATH_OR_HUB_ID        CLIP's embeddings, those of the reward "clip", with gradient to the image
    reward:NAME[:ARGUMENT]     the embeddings of a reward that has some (rewards.protocol.Embedder)
    open-nsfw, dinov2:..., ... a feature network of the evaluation: of the image alone, without gradient

Of embeddings, the features are the image's and its products with the prompt's, element by element: a linear head on the
products generalizes their cosine, which is the CLIP score.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.registry import load_plugins, rewards
from fewstep.data.images import to_uint8
from fewstep.errors import UserError
from fewstep.evaluation.feature_networks import FeatureNetwork, open_features
from fewstep.rewards.protocol import Embedder, Reward
from fewstep.rewards.specs import open_plugin

REWARD, CLIP = "reward", "clip"


@dataclass(frozen=True)
class PreferenceFeatures:
    """Frozen features.

    Attributes:
        compute: (images [B, 3, H, W] in [0, 1], prompts) -> float32 [B, D] on the images' device.
        differentiable: whether they have a gradient with respect to the images.
        license: of the weights.
        parameters: bytes of the weights, 0 where that is not known.
        activations: bytes for each image, as in :class:`fewstep.rewards.protocol.RewardInfo`.
    """

    compute: Callable[[Tensor, Sequence[str]], Tensor]
    differentiable: bool
    license: str
    parameters: int = 0
    activations: int = 0


def open_preference_features(spec: str, device: torch.device | str = "cpu") -> PreferenceFeatures:
    """The features of a name, as listed above.

    Raises:
        UserError: there are none of this name, the reward has no embeddings, or the checkpoint cannot be loaded.
    """
    kind, _, argument = spec.partition(":")
    if kind == REWARD or (kind == CLIP and argument):
        load_plugins()
        reward: Reward = open_plugin(rewards, argument if kind == REWARD else spec, device)
        if not isinstance(reward, Embedder):
            raise UserError(f"features {spec}: this reward has no embeddings; take clip:PATH_OR_HUB_ID or open-nsfw")
        info = reward.info
        return PreferenceFeatures(
            _joint(reward.embeddings), info.differentiable, info.license, info.parameters, info.activations
        )
    network = open_features(spec, device)
    return PreferenceFeatures(_of_image(network), False, f"that of the feature network {network.name}")


def stored_spec(spec: str, folder: Path) -> str:
    """How a file in ``folder`` names features: a local path in them as its path from the folder, which starts with a
    dot."""
    head, path = _split(spec)
    if not path or not Path(path).expanduser().exists():
        return spec
    relative = Path(os.path.relpath(Path(path).expanduser().resolve(), folder.resolve())).as_posix()
    return head + (relative if relative.startswith(".") else f"./{relative}")


def opened_spec(stored: str, folder: Path) -> str:
    """The features that a file in ``folder`` names, with a path from the working directory."""
    head, path = _split(stored)
    return head + os.path.normpath(folder / path) if path.startswith(".") else stored


def _split(spec: str) -> tuple[str, str]:
    """ "reward:NAME:" and "PATH", or "NAME:" and "PATH"; "" where there is none."""
    parts = spec.split(":", 2 if spec.startswith(f"{REWARD}:") else 1)
    path = parts.pop() if len(parts) > (2 if spec.startswith(f"{REWARD}:") else 1) else ""
    return "".join(f"{part}:" for part in parts), path


def _joint(embeddings: Callable[[Tensor, Sequence[str]], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def features(images: Tensor, prompts: Sequence[str]) -> Tensor:
        image, text = embeddings(images, prompts)
        return torch.cat([image, image * text], dim=-1)

    return features


def _of_image(network: FeatureNetwork) -> Callable[..., Tensor]:
    def features(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return network(to_uint8(images.detach())).to(images.device)

    return features
