"""Prompt encoding with a causal language model, in batches of bounded size, with a cache of bounded size."""

from __future__ import annotations

from collections import OrderedDict
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
CACHE_BYTES = 2**28  # of features that an encoder keeps: some 1,000 prompts of Z-Image


def apply_chat_template(
    tokenizer: Any, text: str, system: str = "", assistant_prefix: str = "", thinking: bool = True
) -> str:
    """``text`` as the user's turn of the tokenizer's chat template.

    Args:
        thinking: whether it is enabled.
        system: the system prompt; "" leaves the turn out.
        assistant_prefix: text placed inside ``<think>...</think>`` after the user's turn; "" leaves it out.

    Raises:
        UserError: the tokenizer's template is damaged, or has no system turn.
    """
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": text}]
    try:
        chat = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    except (TemplateError, TypeError, ValueError) as error:
        turn = " with a system prompt" if system else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{tokenizer.name_or_path}: its chat template cannot be applied{turn} ({reason})") from None
    return f"{chat}<think>\n{assistant_prefix}\n</think>\n\n" if assistant_prefix else chat


class FeatureCache:
    """Features by key; beyond ``capacity`` bytes, those that were not used for the longest time are dropped."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.bytes = capacity, 0
        self._entries: OrderedDict[Any, Tensor] = OrderedDict()

    def get(self, key: Any) -> Tensor | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def add(self, key: Any, feature: Tensor) -> None:
        """``key`` must be new."""
        self._entries[key] = feature
        self.bytes += feature.nbytes
        while self.bytes > self.capacity:
            self.bytes -= self._entries.popitem(last=False)[1].nbytes


class PromptEncoder:
    """Encodes prompts, and caches them by text, system prompt and assistant prefix in the text encoder's dtype.

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
        self._cache = FeatureCache(CACHE_BYTES)

    def __call__(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> EncodedPrompts:
        """Encode prompts, as one batch in fp32; "" is the null prompt, through the same template.

        Args:
            system: the system prompt; None is the encoder's default.
            assistant_prefix: text placed inside ``<think>...</think>``.

        Raises:
            UserError: a prompt with its template exceeds ``max_tokens``, or is not valid Unicode.
        """
        return EncodedPrompts.pad(self.features(texts, system=system, assistant_prefix=assistant_prefix))

    @torch.no_grad()
    def features(self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = "") -> list[Tensor]:
        """The features [L, D] of prompts in the text encoder's dtype, cached. Arguments and errors as for a call."""
        system = self.system if system is None else system
        keys = [(text, system, assistant_prefix) for text in texts]
        found = {key: feature for key in dict.fromkeys(keys) if (feature := self._cache.get(key)) is not None}
        new = [key for key in dict.fromkeys(keys) if key not in found]
        if new:
            with self.on_device():
                made = self.encode_uncached(
                    [text for text, _, _ in new], system=system, assistant_prefix=assistant_prefix
                )
            for key, feature in zip(new, made, strict=True):
                found[key] = feature
                self._cache.add(key, feature)
        return [found[key] for key in keys]

    @torch.no_grad()
    def encode_uncached(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> list[Tensor]:
        """As :meth:`features`, without the cache; the text encoder must be on its device."""
        tokens = self._tokens(texts, system, assistant_prefix)
        return [feature for batch in _batches(tokens) for feature in self._encode_batch(batch)]

    def check(self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = "") -> None:
        """Raises: UserError as a call would, without the text encoder's work."""
        for start in range(0, len(texts), 1000):
            self._tokens(texts[start : start + 1000], system, assistant_prefix)

    def _tokens(self, texts: Sequence[str], system: str | None, assistant_prefix: str) -> list[Tensor]:
        chats = [self.template(text, system=system, assistant_prefix=assistant_prefix) for text in texts]
        return tokenize(self.tokenizer, texts, chats, self.max_tokens)

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
        # clones: a view would keep the whole padded batch in memory
        return [feature[: len(ids)].clone() for feature, ids in zip(features, tokens, strict=True)]


def tokenize(tokenizer: Any, texts: Sequence[str], chats: Sequence[str], max_tokens: int) -> list[Tensor]:
    """The tokens [L] of each prompt.

    Args:
        texts: the prompts, for messages.
        chats: the prompts in their template.
        max_tokens: of one of ``chats``.

    Raises:
        UserError: one has more tokens, or is not valid Unicode.
    """
    for chat in chats:
        _check_unicode(chat)
    tokens = [torch.tensor(ids) for ids in tokenizer(list(chats)).input_ids] if chats else []
    for text, ids in zip(texts, tokens, strict=True):
        if len(ids) > max_tokens:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise UserError(f"prompt has {len(ids)} tokens, at most {max_tokens} fit: {shown!r}")
    return tokens


def _check_unicode(chat: str) -> None:
    try:
        chat.encode()
    except UnicodeEncodeError as error:
        shown = chat[max(0, error.start - 40) : error.start + 1]
        raise UserError(f"not valid Unicode: remove the lone surrogate at the end of {shown!r}") from None


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
