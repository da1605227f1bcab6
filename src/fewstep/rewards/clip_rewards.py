"""Rewards that compare an image with its prompt by CLIP: CLIP score, PickScore, HPSv2.1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.rewards.clip_model import ClipModel
from fewstep.rewards.protocol import RewardInfo


class ClipReward:
    """The cosine of image and prompt times 100 (CLIP score, arXiv 2104.08718, without its cut at 0: a cut has no
    gradient), in [-100, 100].

    Args:
        checkpoint: as for :class:`fewstep.rewards.clip_model.ClipModel`.

    Raises:
        UserError: as there.
    """

    name = "clip"
    license = "that of the checkpoint (MIT for openai/clip-*)"

    def __init__(self, checkpoint: str, device: torch.device | str = "cpu") -> None:
        self.clip = ClipModel(checkpoint, device)
        self.factor = self._factor()
        # on the meta device the factor is a shape
        largest = math.inf if self.factor.is_meta else float(self.factor)
        self.info = RewardInfo(
            differentiable=True,
            range=(-largest, largest),
            license=self.license,
            parameters=self.clip.weight_bytes,
            activations=self.clip.activation_bytes,
        )

    def _factor(self) -> Tensor:
        return torch.tensor(100.0, device=self.clip.device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B], with gradient to the images. Long prompts are cut.

        Args:
            images: [B, 3, H, W] in [0, 1].
        """
        image, text = self.embeddings(images, prompts)
        return self.factor * (image * text).sum(1)

    def embeddings(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, E] of the images, with gradient to them, and of the prompts. Arguments as for the call."""
        return self.clip.image(images), self.clip.text(prompts)


class PickScore(ClipReward):
    """PickScore (arXiv 2305.01569): the trained scale, about 100, times the cosine, in [-100, 100]; often about 20.

    Args:
        checkpoint: yuvalkirstain/PickScore_v1, or a local folder of it.
    """

    name = "pickscore"
    license = "MIT (PickScore_v1)"

    def _factor(self) -> Tensor:
        return self.clip.scale


class HPSv2(ClipReward):
    """Human Preference Score v2.1 (arXiv 2306.09341): the cosine, in [-1, 1]; often about 0.25.

    Images that are not square are fitted into the square with black bars, as its own code does it.

    Args:
        checkpoint: HPSv2.1 as safetensors, in open_clip's layout (ViT-H-14) or as transformers' CLIPModel, with CLIP's
            tokenizer. The published HPS_v2.1_compressed.pt is a pickle, which must be converted first.
    """

    name = "hpsv2"
    license = "Apache-2.0 (HPSv2)"

    def __init__(self, checkpoint: str, device: torch.device | str = "cpu") -> None:
        super().__init__(checkpoint, device)
        size = self.clip.preprocess.size
        self.clip.preprocess = replace(self.clip.preprocess, fit="longest", edge=size)

    def _factor(self) -> Tensor:
        return torch.tensor(1.0, device=self.clip.device)
