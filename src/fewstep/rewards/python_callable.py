"""Any Python callable as a reward: "python:module:function"."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.rewards.protocol import RewardInfo

UNKNOWN = RewardInfo(differentiable=False, range=(-math.inf, math.inf), license="unknown")


class PythonReward:
    """A function ``(images [B, 3, H, W] in [0, 1], prompts) -> B scores``, a tensor or a list of numbers.

    Args:
        function: called with detached images unless its ``info`` says that it is differentiable.
        name: of the reward in logs.
        info: what the function is; without it, a function without gradient and of unknown range.
    """

    def __init__(self, function: Callable[[Tensor, list[str]], Any], name: str, info: RewardInfo = UNKNOWN) -> None:
        self.function, self.name, self.info = function, name, info

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], float32, on the images' device."""
        given = images if self.info.differentiable else images.detach()
        return torch.as_tensor(self.function(given, list(prompts)), dtype=torch.float32, device=images.device)


def python_reward(function: str) -> PythonReward:
    """The callable of "module:function"; modules in the working directory are found too.

    An attribute ``reward_info`` of the callable, a RewardInfo, says what it is; without one it has no gradient.

    Raises:
        UserError: the module cannot be imported or has no such callable, or ``reward_info`` is no RewardInfo.
    """
    module_name, _, attribute = function.partition(":")
    if not module_name or not attribute:
        raise UserError(f"reward python:{function}: name a callable, as in python:my_rewards:brightness")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing it runs the user's code
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"reward python:{function}: {module_name} cannot be imported: {type(error).__name__}: {first}"
        ) from error
    finally:
        sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"reward python:{function}: {module_name} has no callable {attribute}")
    info = getattr(found, "reward_info", UNKNOWN)
    if not isinstance(info, RewardInfo):
        raise UserError(f"reward python:{function}: its reward_info is {type(info).__name__}, no RewardInfo")
    return PythonReward(found, f"python:{function}", info)
