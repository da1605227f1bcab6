"""Rewards by name, with an argument where they need one: "emoji", "pickscore:PATH_OR_ID", "python:module:function"."""

from __future__ import annotations

import torch

from fewstep.core.registry import rewards
from fewstep.rewards.protocol import Reward
from fewstep.rewards.specs import open_plugin


def open_reward(spec: str, device: torch.device | str = "cpu") -> Reward:
    """The reward of a name, or of "name:argument"; what the argument is depends on the reward.

    Raises:
        UserError: there is no such reward, its argument is missing or wrong, or a package is not installed.
    """
    reward: Reward = open_plugin(rewards, spec, device)
    return reward
