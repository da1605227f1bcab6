"""The reward "background": whether the background has the color that the prompt names. It has no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.emoji.dataset import BACKGROUNDS, EmojiDataset
from fewstep.emoji.reward import resized
from fewstep.rewards.protocol import RewardInfo

#: Largest difference in any channel from the named color, in [0, 1]; real images differ by 0.05 at most.
TOLERANCE = 0.08


class BackgroundReward:
    """The share of the border's pixels that have the prompt's color, in [0, 1]; NaN for a prompt that is not of the
    dataset. The border, one pixel wide at 64 px, is background in every real image."""

    name = "background"
    info = RewardInfo(differentiable=False, range=(0.0, 1.0), license="Apache-2.0")

    def __init__(self) -> None:
        self.dataset = EmojiDataset.load()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B].

        Args:
            images: [B, 3, H, W] in [0, 1], of any size.
        """
        specs = [self.dataset.parse(prompt) for prompt in prompts]
        named = [BACKGROUNDS[spec.background] if spec is not None else (0, 0, 0) for spec in specs]
        colors = torch.tensor(named, device=images.device).float()[:, :, None] / 255
        pixels = resized(images.float())
        border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]], dim=2)
        share = ((border - colors).abs().amax(1) <= TOLERANCE).float().mean(1)
        known = torch.tensor([spec is not None for spec in specs], device=images.device)
        return torch.where(known, share, torch.nan)
