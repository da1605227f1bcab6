"""Prompts as a denoiser takes them: batches of encoded prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class EncodedPrompts:
    """A batch of encoded prompts.

    Attributes:
        features: [B, L, D], zero beyond each prompt's length.
        lengths: [B], the number of tokens of each; L is at least the largest. They stay on the CPU: a forward decides
            by them what to compute, and would have to wait for the GPU's answer.
    """

    features: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> EncodedPrompts:
        """Some of the prompts; the padding is cut to the longest of them."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device="cpu")
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(lengths) else 0
        return EncodedPrompts(self.features[index][:, :longest], lengths)

    def repeat(self, count: int) -> EncodedPrompts:
        """The whole batch ``count`` times, one after another."""
        return EncodedPrompts(self.features.repeat(count, 1, 1), self.lengths.repeat(count))

    def to(self, device: torch.device | str) -> EncodedPrompts:
        return EncodedPrompts(self.features.to(device), self.lengths)

    @staticmethod
    def concat(parts: Sequence[EncodedPrompts]) -> EncodedPrompts:
        longest = max(part.features.shape[1] for part in parts)
        features = [nn.functional.pad(p.features, (0, 0, 0, longest - p.features.shape[1])) for p in parts]
        return EncodedPrompts(torch.cat(features), torch.cat([part.lengths for part in parts]))
