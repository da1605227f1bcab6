"""A differentiable reward for runs of the program: "python:rl_rewards:brightness"."""

from __future__ import annotations

from torch import Tensor

from fewstep.rewards.protocol import RewardInfo


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(dim=1)


brightness.reward_info = RewardInfo(True, (0.0, 1.0), "none")  # type: ignore[attr-defined]
