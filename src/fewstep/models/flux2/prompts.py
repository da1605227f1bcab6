"""FLUX.2 [klein]'s prompts: hidden states of three layers of Qwen3, of 512 tokens with the padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.core.precision import without_autocast
from fewstep.errors import UserError
from fewstep.models.text import PromptEncoder, apply_chat_template

LAYERS = (9, 18, 27)  # whose hidden states are side by side in a token's features
TOKENS = 512  # of every prompt; the transformer attends to the padding, too
BATCH = 8  # prompts encoded together: 4,096 tokens


class Flux2PromptEncoder(PromptEncoder):
    """The features of a prompt are [512, 3 D], of a chat without a system prompt and without thinking."""

    def template(self, text: str, *, system: str | None = None, assistant_prefix: str = "") -> str:
        parts = {"system_prompt": self.system if system is None else system, "assistant_prefix": assistant_prefix}
        for name, value in parts.items():
            if value:
                raise UserError(f"{name}: prompts of Flux2KleinPipeline have no such part; leave it out")
        return apply_chat_template(self.tokenizer, text, thinking=False)

    @torch.no_grad()
    def encode_uncached(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> list[Tensor]:
        tokens = self._tokens(texts, system, assistant_prefix)
        return [
            feature.clone()
            for start in range(0, len(tokens), BATCH)
            for feature in self._encode_tokens(tokens[start : start + BATCH])
        ]

    def _encode_tokens(self, tokens: Sequence[Tensor]) -> Tensor:
        """[B, 512, 3 D] of one batch."""
        device = next(self.text_encoder.parameters()).device
        pad = self.tokenizer.pad_token_id
        ids, mask = (
            torch.stack([nn.functional.pad(row, (0, TOKENS - len(row)), value=value) for row in rows]).to(device)
            for rows, value in ((tokens, pad), ([torch.ones_like(row) for row in tokens], 0))
        )
        with without_autocast(device):  # cached features must not depend on the caller's autocast
            states = self.text_encoder.model(  # type: ignore[operator]  # without the language head
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states
        return torch.cat([states[layer] for layer in LAYERS], dim=-1)
