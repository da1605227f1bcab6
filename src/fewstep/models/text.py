"""Prompt encoding with a causal language model: each prompt encoded once, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.precision import without_autocast
from fewstep.errors import UserError

MAX_TOKENS = 512  # of a prompt with its template, unless a family has another limit
#: Tokens, padding included, in one batch of the text encoder. All layers' hidden states are in memory at once: 0.8 GB
#: for Z-Image's text encoder in bf16.
MAX_TOKENS_PER_BATCH = 4096


class PromptTooLong(ValueError):
    """A prompt has more tokens than the model takes."""


def apply_chat_template(tokenizer: Any, text: str, system: str = "", assistant_prefix: str = "") -> str:
    """``text`` as the user's turn of the tokenizer's chat template, with thinking enabled.

    Args:
        system: the system prompt; "" leaves the turn out.
        assistant_prefix: text placed inside ``<think>...</think>`` after the user's turn; "" leaves it out.

    Raises:
        UserError: the tokenizer's template is damaged, or has no system turn.
    """
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": text}]
    try:
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    except (TemplateError, TypeError, ValueError) as error:
        turn = " with a system prompt" if system else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{tokenizer.name_or_path}: its chat template cannot be applied{turn} ({reason})") from None
    return f"{chat}<think>\n{assistant_prefix}\n</think>\n\n" if assistant_prefix else chat


class PromptEncoder:
    """Encodes each prompt once and caches it by its text, system prompt and assistant prefix.

    Only as many tokens run through the text encoder as the longest prompt of a batch has; diffusers pads to the limit.
    Padding is on the right and the encoder is causal, so the features are the same.

    Args:
        tokenizer: with a chat template.
        text_encoder: a causal language model without its head.
        system: the default system prompt; "" is none.
        hidden_state: index of the layer whose hidden states are the features.
        max_tokens: limit of a prompt with its template.

    Attributes:
        on_device: makes contexts in which the text encoder is on the device it computes on; set by offloading.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module,
        system: str = "",
        *,
        hidden_state: int = -2,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.tokenizer, self.text_encoder, self.system = tokenizer, text_encoder, system
        self.hidden_state, self.max_tokens = hidden_state, max_tokens
        self.on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        self._cache: dict[tuple[str, str, str], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> EncodedPrompts:
        """Encode prompts; "" is the null prompt, through the same template.

        Args:
            system: the system prompt; None is the encoder's default.
            assistant_prefix: text placed inside ``<think>...</think>``.

        Raises:
            PromptTooLong: a prompt with its template exceeds ``max_tokens``.
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
        """The features [L, D] of prompts in the text encoder's dtype; nothing is cached. Arguments and errors as for a
        call."""
        chats = [self.template(text, system=system, assistant_prefix=assistant_prefix) for text in texts]
        tokens = [torch.tensor(ids) for ids in self.tokenizer(chats).input_ids]
        for text, ids in zip(texts, tokens, strict=True):
            if len(ids) > self.max_tokens:
                shown = text if len(text) <= 60 else f"{text[:57]}..."
                raise PromptTooLong(f"prompt has {len(ids)} tokens, at most {self.max_tokens} fit: {shown!r}")
        return [feature for batch in _batches(tokens) for feature in self._encode_batch(batch)]

    def template(self, text: str, *, system: str | None = None, assistant_prefix: str = "") -> str:
        """The text that is tokenized for a prompt. Arguments as for a call."""
        return apply_chat_template(self.tokenizer, text, self.system if system is None else system, assistant_prefix)

    def count(self, text: str) -> int:
        """Number of tokens of a prompt with its template."""
        return len(self.tokenizer(self.template(text)).input_ids)

    def _encode_batch(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """The features of one batch, padded on the right to its longest prompt."""
        device = next(self.text_encoder.parameters()).device
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
        with without_autocast(device):  # cached features must not depend on the caller's autocast
            features = self.text_encoder(
                input_ids=nn.utils.rnn.pad_sequence(list(tokens), batch_first=True).to(device),
                attention_mask=mask.to(device),
                output_hidden_states=True,
            ).hidden_states[self.hidden_state]
        return [feature[: len(ids)] for feature, ids in zip(features, tokens, strict=True)]


def _batches(prompts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive prompts in batches of at most ``MAX_TOKENS_PER_BATCH`` tokens, padding included."""
    batch: list[Tensor] = []
    longest = 0
    for prompt in prompts:
        longest = max(longest, len(prompt))
        if batch and longest * (len(batch) + 1) > MAX_TOKENS_PER_BATCH:
            yield batch
            batch, longest = [], len(prompt)
        batch.append(prompt)
    if batch:
        yield batch
