"""The reward "preference:HEAD": a preference head on its frozen features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.preferences.features import open_preference_features, opened_spec
from fewstep.preferences.head import load_head
from fewstep.rewards.protocol import RewardInfo


class PreferenceReward:
    """Scores in log-odds of being preferred to an average image of the votes.

    Args:
        head: a folder, as ``fewstep prefs train`` writes it.

    Raises:
        UserError: a file is missing or damaged, or its features cannot be opened.
    """

    name = "preference"

    def __init__(self, head: str, device: torch.device | str = "cpu") -> None:
        self.head, self.description = load_head(head)
        self.features = open_preference_features(opened_spec(self.description["features"], Path(head)), device)
        self.info = RewardInfo(
            differentiable=self.features.differentiable,
            range=(-math.inf, math.inf),
            license=f"votes, and {self.features.license}",
            parameters=self.features.parameters + 3 * self.head.weight.nbytes,
            activations=self.features.activations,
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores float32 [B]; with gradient to the images where the features have one.

        Args:
            images: [B, 3, H, W] in [0, 1].
        """
        features = self.features.compute(images, prompts)
        if features.shape[1] != len(self.head.weight):
            raise UserError(
                f"{self.description['features']}: {features.shape[1]} features, but the head was trained on "
                f"{len(self.head.weight)}; the network is another one"
            )
        return self.head(features)
