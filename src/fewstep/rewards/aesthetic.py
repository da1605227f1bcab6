"""LAION's aesthetic predictor (improved-aesthetic-predictor): a head on CLIP L/14's image embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.rewards.checkpoints import weight_bytes
from fewstep.rewards.clip_model import ClipModel
from fewstep.rewards.protocol import RewardInfo
from fewstep.rewards.score_head import score_head


class AestheticReward:
    """How good people find an image, whatever its prompt: trained on ratings from 1 to 10, without bound.

    Args:
        clip_and_head: "CLIP+HEAD": CLIP L/14 as for :class:`fewstep.rewards.clip_model.ClipModel`, and the head's
            safetensors file, with the tensors of sac+logos+ava1-l14-linearMSE.pth (layers.0.weight, ...).

    Raises:
        UserError: one of both is missing or damaged, or the head is of another width.
    """

    name = "aesthetic"

    def __init__(self, clip_and_head: str, device: torch.device | str = "cpu") -> None:
        clip, plus, head = clip_and_head.rpartition("+")
        if not plus or not clip:
            raise UserError(
                f"reward aesthetic:{clip_and_head}: give CLIP L/14 and the head's file, as in CLIP+HEAD.safetensors"
            )
        if not Path(head).is_file():
            raise UserError(f"{head}: no such file; it is the aesthetic predictor's head as safetensors")
        with reading(head, "it must be a safetensors file; a .pth file is a pickle, and must be converted first"):
            weights = load_file(head)
        self.head = score_head(weights, head).to(device)
        self.clip = ClipModel(clip, device)
        width, embed = self.head[0].in_features, self.clip.model.config.projection_dim  # type: ignore[index]
        if width != embed:
            raise UserError(f"{head}: the head takes embeddings of {width} numbers, and {clip} gives {embed}")
        self.info = RewardInfo(
            differentiable=True,
            range=(-math.inf, math.inf),
            license="MIT (CLIP), Apache-2.0 (head)",
            parameters=self.clip.weight_bytes + weight_bytes(self.head),
            activations=self.clip.activation_bytes,
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B], with gradient to the images.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: not used.
        """
        return self.head(self.clip.image(images))[:, 0]
