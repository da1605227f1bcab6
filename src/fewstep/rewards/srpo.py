"""SRPO's form of a reward (arXiv 2509.06942): the difference of its scores with good and with bad words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.rewards.open import open_reward
from fewstep.rewards.protocol import Reward, RewardInfo

#: k of DMDR's text-to-image recipe.
EXTRA = 0.1
POSITIVE, NEGATIVE = "Realistic photo, ", "CG render, "


class SRPOReward:
    """``(1 + k) r(image, positive + prompt) - r(image, negative + prompt)``: what a reward likes in any image cancels,
    and with it most of what a student could exploit.

    Args:
        reward: one that reads the prompt.
        positive, negative: words that are put before the prompt.
        extra: k; at least 0.
    """

    def __init__(
        self, reward: Reward, positive: str = POSITIVE, negative: str = NEGATIVE, extra: float = EXTRA
    ) -> None:
        self.reward, self.positive, self.negative, self.extra = reward, positive, negative, extra
        self.name = f"srpo:{reward.name}"

    @property
    def info(self) -> RewardInfo:
        low, high = self.reward.info.range
        bounds = ((1 + self.extra) * low - high, (1 + self.extra) * high - low)
        return replace(self.reward.info, range=bounds if math.isfinite(high - low) else (-math.inf, math.inf))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B]; arguments as for any reward."""
        better = self.reward(images, [self.positive + prompt for prompt in prompts])
        worse = self.reward(images, [self.negative + prompt for prompt in prompts])
        return (1 + self.extra) * better - worse


def srpo_reward(reward: str, device: torch.device | str = "cpu") -> SRPOReward:
    """The form of "REWARD", or of "POSITIVE|NEGATIVE:REWARD" with words of one's own, as in
    "Realistic photo|CG render:hpsv2:/models/hpsv2".

    Raises:
        UserError: a word is missing, or as for :func:`fewstep.rewards.open.open_reward`.
    """
    words, colon, inner = reward.partition(":")
    if "|" not in words:
        return SRPOReward(open_reward(reward, device))
    positive, _, negative = (word.strip() for word in words.partition("|"))
    if not colon or not inner or not positive or not negative:
        raise UserError(f"reward srpo:{reward}: write srpo:REWARD, or srpo:POSITIVE|NEGATIVE:REWARD")
    return SRPOReward(open_reward(inner, device), f"{positive}, ", f"{negative}, ")
