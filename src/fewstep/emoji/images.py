"""The image source "emoji": real images of the emoji dataset's prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.emoji.dataset import EmojiDataset
from fewstep.errors import UserError


class EmojiImages:
    """The image source "emoji": real images of the dataset for its prompts."""

    def __init__(self) -> None:
        self.dataset = EmojiDataset.load()

    def knows(self, prompt: str) -> bool:
        """Whether the dataset has images of ``prompt``."""
        return self.dataset.parse(prompt) is not None

    def render(self, prompts: Sequence[str], generator: torch.Generator | None, size: int) -> Tensor:
        """A real image of each prompt, with a random placement and shade: [N, 3, size, size] in [0, 1].

        Raises:
            UserError: a prompt that is not of the dataset.
        """
        specs = []
        for prompt in prompts:
            spec = self.dataset.parse(prompt)
            if spec is None:
                raise UserError(f"the emoji dataset has no image of {prompt!r}")
            specs.append(spec)
        return self.dataset.render(specs, generator, size)
