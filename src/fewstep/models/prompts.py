"""Prompts as the transformer takes them: text through Z-Image's chat template and the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_TOKENS = 512  # diffusers' ZImagePipeline cuts prompts there; here a longer one is refused


@dataclass
class EncodedPrompts:
    """A batch of encoded prompts.

    Attributes:
        features: [B, L, D], zero beyond each prompt's length.
        lengths: [B], the number of tokens of each; L is at least the largest.
    """

    features: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> EncodedPrompts:
        """Some of the prompts; the padding is cut to the longest of them."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.lengths.device)
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(lengths) else 0
        return EncodedPrompts(self.features[index][:, :longest], lengths)

    def repeat(self, count: int) -> EncodedPrompts:
        """The whole batch ``count`` times, one after another."""
        return EncodedPrompts(self.features.repeat(count, 1, 1), self.lengths.repeat(count))

    def to(self, device: torch.device | str) -> EncodedPrompts:
        return EncodedPrompts(self.features.to(device), self.lengths.to(device))

    @staticmethod
    def cat(parts: Sequence[EncodedPrompts]) -> EncodedPrompts:
        longest = max(part.features.shape[1] for part in parts)
        features = [nn.functional.pad(p.features, (0, 0, 0, longest - p.features.shape[1])) for p in parts]
        return EncodedPrompts(torch.cat(features), torch.cat([part.lengths for part in parts]))


class PromptTooLong(ValueError):
    """A prompt has more tokens than the model takes."""


def chat(tokenizer: Any, text: str) -> str:
    """``text`` as the user's turn of Z-Image's chat template, thinking enabled, as diffusers' pipeline writes it."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


class PromptEncoder:
    """Encodes each prompt once: what was encoded is kept by its text.

    Only as many tokens run through the text encoder as there are; diffusers pads to 512. Padding is on the right and
    the encoder is causal, so the features are the same.
    """

    def __init__(self, tokenizer: Any, text_encoder: nn.Module) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self._cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 128) -> EncodedPrompts:
        """Encode prompts; "" is the null prompt, through the same template.

        Raises:
            PromptTooLong: a prompt, with its template, has more than 512 tokens.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for start in range(0, len(new), batch_size):
            part = new[start : start + batch_size]
            for text, feature in zip(part, self.each(part), strict=True):
                self._cache[text] = feature.float()
        chosen = [self._cache[text] for text in texts]
        return EncodedPrompts(
            nn.utils.rnn.pad_sequence(chosen, batch_first=True),
            torch.tensor([len(feature) for feature in chosen], device=chosen[0].device),
        )

    @torch.no_grad()
    def each(self, texts: Sequence[str]) -> list[Tensor]:
        """The features [L, D] of one batch of prompts as the text encoder gives them; nothing is kept.

        Raises:
            PromptTooLong: a prompt, with its template, has more than 512 tokens.
        """
        tokens = self.tokenizer([chat(self.tokenizer, text) for text in texts], padding=True, return_tensors="pt")
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        for text, length in zip(texts, lengths, strict=True):
            if length > MAX_TOKENS:
                shown = text if len(text) <= 60 else f"{text[:57]}..."
                raise PromptTooLong(f"prompt has {length} tokens, at most {MAX_TOKENS} fit: {shown!r}")
        device = next(self.text_encoder.parameters()).device
        features = self.text_encoder(
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
            output_hidden_states=True,
        ).hidden_states[-2]
        return [feature[:length] for feature, length in zip(features, lengths, strict=True)]

    def count(self, text: str) -> int:
        """The tokens of a prompt with its template."""
        return len(self.tokenizer(chat(self.tokenizer, text)).input_ids)
