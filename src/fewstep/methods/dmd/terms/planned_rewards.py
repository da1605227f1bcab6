"""Rewards on the meta device for ``fewstep plan``: shapes, before any weight is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.rewards.open import open_reward
from fewstep.rewards.protocol import Reward, RewardInfo


class ViT(NamedTuple):
    """An image tower: OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14, with the parameters of both towers together."""

    parameters: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


VIT_L = ViT(427_616_513, 1024, 4096, 24, 16)
VIT_H = ViT(986_109_441, 1280, 5120, 32, 16)
PUBLISHED = {"clip": VIT_L, "hpsv2": VIT_H, "pickscore": VIT_H}
_PIXELS, _PATCH = 224, 14


class PublishedReward:
    """A reward whose checkpoint is not on this machine: the image tower of its published architecture."""

    def __init__(self, name: str, tower: ViT) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.name = name
        sizes: dict[str, Any] = {"image_size": _PIXELS, "patch_size": _PATCH, **tower._asdict()}
        parameters = sizes.pop("parameters")
        with torch.device("meta"):
            self.tower: nn.Module = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval().requires_grad_(False)
        self.info = RewardInfo(True, (-1.0, 1.0), "that of the checkpoint", parameters=4 * parameters)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = F.interpolate(images.float(), (_PIXELS, _PIXELS), mode="bicubic", antialias=True)
        return self.tower(pixel_values=pixels).pooler_output.mean(dim=1)


class AnyReward:
    """A reward that does not run without its weights: no memory of its own is counted."""

    def __init__(self, name: str, info: RewardInfo) -> None:
        self.name, self.info = name, info

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(dim=1)


def plan_reward(spec: str) -> Reward:
    """The shapes of a reward: of its checkpoint where that is a local folder, else of its published architecture.

    Raises:
        UserError: there is no such reward.
    """
    name, _, argument = spec.removeprefix("srpo:").partition(":")
    if name in PUBLISHED and not Path(argument).expanduser().is_dir():
        return PublishedReward(name, PUBLISHED[name])
    if name in PUBLISHED:
        return open_reward(spec, "meta")
    try:
        return AnyReward(name, open_reward(spec).info)
    except UserError as problem:
        if "unknown reward" in str(problem):
            raise
        return AnyReward(name, RewardInfo(True, (-1.0, 1.0), "unknown"))
