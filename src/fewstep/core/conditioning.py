"""Conditioning of a denoiser: batches of encoded prompts."""

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
        lengths: [B], number of tokens of each; L is at least the largest. They stay on the CPU: the shapes of a forward
            depend on them, and reading them from a GPU would synchronize it.
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
        """The features on ``device``; the lengths stay on the CPU."""
        return EncodedPrompts(self.features.to(device), self.lengths)

    @staticmethod
    def pad(features: Sequence[Tensor]) -> EncodedPrompts:
        """One batch, in fp32, of the features [L_i, D] of single prompts."""
        padded = nn.utils.rnn.pad_sequence([feature.float() for feature in features], batch_first=True)
        return EncodedPrompts(padded, torch.tensor([len(feature) for feature in features]))

    @staticmethod
    def concat(batches: Sequence[EncodedPrompts]) -> EncodedPrompts:
        """Several batches as one, padded to the longest prompt."""
        longest = max(batch.features.shape[1] for batch in batches)
        features = [nn.functional.pad(b.features, (0, 0, 0, longest - b.features.shape[1])) for b in batches]
        return EncodedPrompts(torch.cat(features), torch.cat([batch.lengths for batch in batches]))
