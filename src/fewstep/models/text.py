"""Prompts as the transformer takes them: text through Z-Image's chat template and the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.precision import without_autocast

MAX_TOKENS = 512  # diffusers' ZImagePipeline cuts prompts there; here a longer one is refused
MAX_TOKENS_PER_BATCH = (
    4096  # tokens: what all layers say of them is in memory together, 0.8 GB for Z-Image's text encoder in bf16
)


class PromptTooLong(ValueError):
    """A prompt has more tokens than the model takes."""


def apply_chat_template(tokenizer: Any, text: str, system: str = "", assistant_prefix: str = "") -> str:
    """``text`` as the user's turn of Z-Image's chat template, thinking enabled, as in diffusers.

    Args:
        system: the system's turn before it; "" leaves it out.
        assistant_prefix: what the model is to have thought already; "" leaves it out.
    """
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": text}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return f"{asked}<think>\n{assistant_prefix}\n</think>\n\n" if assistant_prefix else asked


def _at_once(prompts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Prompts in a row, in batches of at most ``AT_ONCE`` tokens with their padding."""
    part: list[Tensor] = []
    longest = 0
    for prompt in prompts:
        longest = max(longest, len(prompt))
        if part and longest * (len(part) + 1) > MAX_TOKENS_PER_BATCH:
            yield part
            part, longest = [], len(prompt)
        part.append(prompt)
    if part:
        yield part


class PromptEncoder:
    """Encodes each prompt once: what was encoded is kept by its content, the words around it included.

    Args:
        system: the system's turn before every prompt, unless a call says otherwise; "" is none.

    Attributes:
        awake: a maker of contexts in which the text encoder is where it computes; set where it rests elsewhere.

    Only as many tokens run through the text encoder as there are; diffusers pads to 512. Padding is on the right and
    the encoder is causal, so the features are the same.
    """

    def __init__(self, tokenizer: Any, text_encoder: nn.Module, system: str = "") -> None:
        self.tokenizer, self.text_encoder, self.system = tokenizer, text_encoder, system
        self.on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        self._cache: dict[tuple[str, str, str], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> EncodedPrompts:
        """Encode prompts; "" is the null prompt, through the same template.

        Args:
            system: None is the encoder's own.
            assistant_prefix: what the model is to have thought of these prompts already.

        Raises:
            PromptTooLong: a prompt, with its template, has more than 512 tokens.
        """
        system = self.system if system is None else system
        keys = [(text, system, assistant_prefix) for text in texts]
        new = [key for key in dict.fromkeys(keys) if key not in self._cache]
        if new:
            with self.on_device():
                features = self.encode_uncached(
                    [text for text, _, _ in new], system=system, assistant_prefix=assistant_prefix
                )
            self._cache |= {key: feature.float() for key, feature in zip(new, features, strict=True)}
        chosen = [self._cache[key] for key in keys]
        return EncodedPrompts(
            nn.utils.rnn.pad_sequence(chosen, batch_first=True),
            torch.tensor([len(feature) for feature in chosen]),
        )

    @torch.no_grad()
    def encode_uncached(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> list[Tensor]:
        """The features [L, D] of prompts as the text encoder gives them, so many at once that memory stays small;
        nothing is kept. Arguments as for a call.

        Raises:
            PromptTooLong: a prompt, with its template, has more than 512 tokens.
        """
        system = self.system if system is None else system
        asked = [apply_chat_template(self.tokenizer, text, system, assistant_prefix) for text in texts]
        tokens = [torch.tensor(ids) for ids in self.tokenizer(asked).input_ids]
        for text, ids in zip(texts, tokens, strict=True):
            if len(ids) > MAX_TOKENS:
                shown = text if len(text) <= 60 else f"{text[:57]}..."
                raise PromptTooLong(f"prompt has {len(ids)} tokens, at most {MAX_TOKENS} fit: {shown!r}")
        return [feature for part in _at_once(tokens) for feature in self._run(part)]

    def _run(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """The features of one batch, padded on the right to its longest."""
        device = next(self.text_encoder.parameters()).device
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
        with without_autocast(device):  # what is kept must not depend on who asked first
            features = self.text_encoder(
                input_ids=nn.utils.rnn.pad_sequence(list(tokens), batch_first=True).to(device),
                attention_mask=mask.to(device),
                output_hidden_states=True,
            ).hidden_states[-2]
        return [feature[: len(ids)] for feature, ids in zip(features, tokens, strict=True)]

    def count(self, text: str) -> int:
        """The tokens of a prompt with its template."""
        return len(self.tokenizer(apply_chat_template(self.tokenizer, text, self.system)).input_ids)
