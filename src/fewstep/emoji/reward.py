"""The reward "emoji": how well an image shows the object, style and background of its prompt, with gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.atomic import write_tensors, write_text
from fewstep.emoji.dataset import EmojiDataset
from fewstep.emoji.reward_net import SIZE, EmojiRewardNet
from fewstep.errors import UserError
from fewstep.rewards.protocol import RewardInfo

BUNDLED_REWARD = Path(__file__).parent.parent / "assets" / "micro_reward"
WEIGHTS, DESCRIPTION = "reward.safetensors", "reward.json"
#: Bytes of an image's activations in fp32, without gradient: the first block's, at 16 px.
ACTIVATIONS = 2 * 3 * 32 * 16 * 16 * 4


class EmojiReward:
    """The cosine of the image's and the prompt's embedding, in [-1, 1]; NaN for a prompt that is not of the dataset.

    Trained on the training combinations alone (train_reward.py). It shares nothing with the emoji classifier, which
    measures the result.

    Args:
        folder: with reward.safetensors and reward.json; the bundled one by default.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """

    name = "emoji"

    def __init__(self, folder: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        path = Path(folder) if folder is not None else BUNDLED_REWARD
        net, self.description = _load(path)
        self.net = net.to(device).eval().requires_grad_(False)
        self.dataset = EmojiDataset.load()
        self.info = RewardInfo(
            differentiable=True,
            range=(-1.0, 1.0),
            license="Apache-2.0; trained on Noto (Apache-2.0), Twemoji (CC-BY-4.0) and Fluent (MIT) emoji",
            parameters=sum(p.nbytes for p in net.parameters()),
            activations=ACTIVATIONS,
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B], with gradient to the images.

        Args:
            images: [B, 3, H, W] in [0, 1], of any size.
        """
        known = torch.tensor([self.dataset.parse(prompt) is not None for prompt in prompts], device=images.device)
        scores = (self.net.image(resized(images.float())) * self.net.text(prompts)).sum(1)
        return torch.where(known, scores, torch.nan)


def resized(images: Tensor) -> Tensor:
    """Images of any size -> [B, 3, 64, 64]."""
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)


def save_reward(net: EmojiRewardNet, description: dict[str, Any], folder: Path) -> None:
    """Write reward.safetensors (fp16) and reward.json; files are replaced atomically."""
    write_tensors(folder / WEIGHTS, {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()})
    write_text(folder / DESCRIPTION, json.dumps(description, ensure_ascii=False, indent=1) + "\n")


def _load(folder: Path) -> tuple[EmojiRewardNet, dict[str, Any]]:
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: train a reward with `fewstep emoji train micro-reward`")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        net = EmojiRewardNet(description["channels"])
        net.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / DESCRIPTION} does not describe a reward ({error})") from None
    except (SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS} does not hold the weights of this reward ({first})") from None
    return net, description
