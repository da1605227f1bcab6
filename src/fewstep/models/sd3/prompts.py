"""SD3's prompts: the hidden states of two CLIP text encoders and T5, and CLIP's pooled vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.precision import without_autocast
from fewstep.errors import UserError
from fewstep.models.text import PromptEncoder

T5_TOKENS = 256  # diffusers' max_sequence_length; shorter prompts are padded, and the padding is attended to
PROMPT_ROWS = 1 + 77 + T5_TOKENS  # pooled vector, CLIP's tokens, T5's
BATCH = 16  # prompts encoded together: 4,096 tokens of T5


class SD3PromptEncoder(PromptEncoder):
    """The features of a prompt are [1 + 77 + 256, D]: the pooled vector, CLIP's tokens and T5's.

    Rows are as wide as T5's hidden states; narrower ones are filled with zeros. All prompts have as many rows. CLIP is
    given the first 77 tokens of a prompt, as in diffusers; T5 must be given all of them.

    Args:
        tokenizers: of the two CLIPs and T5.
        encoders: ``CLIPTextModelWithProjection`` twice and ``T5EncoderModel``; each None where nothing is encoded.
    """

    def __init__(self, tokenizers: Sequence[Any], encoders: Sequence[nn.Module | None], system: str = "") -> None:
        modules = nn.ModuleList(encoders)  # type: ignore[arg-type]  # None is left out
        super().__init__(tokenizers[-1], modules, system, max_tokens=T5_TOKENS)
        self.tokenizers = tokenizers

    def template(self, text: str, *, system: str | None = None, assistant_prefix: str = "") -> str:
        parts = {"system_prompt": self.system if system is None else system, "assistant_prefix": assistant_prefix}
        for name, value in parts.items():
            if value:
                raise UserError(f"{name}: prompts of StableDiffusion3Pipeline have no such part; leave it out")
        return text

    @torch.no_grad()
    def encode_uncached(
        self, texts: Sequence[str], *, system: str | None = None, assistant_prefix: str = ""
    ) -> list[Tensor]:
        self._tokens(texts, system, assistant_prefix)  # refuses prompts that are too long
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return [feature.clone() for part in parts for feature in self._encode_texts(list(part))]

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """[B, 334, D] of one batch."""
        *clips, t5 = self.text_encoder.children()
        device = next(t5.parameters()).device
        with without_autocast(device):  # cached features must not depend on the caller's autocast
            # the first tokenizer's limit is that of both CLIPs, as in diffusers
            limit = self.tokenizers[0].model_max_length
            tokens = [self._padded(index, texts, limit).to(device) for index in range(len(clips))]
            outputs = [clip(ids, output_hidden_states=True) for clip, ids in zip(clips, tokens, strict=True)]
            states = t5(self._padded(-1, texts, T5_TOKENS).to(device))[0]
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)[:, None]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        width = states.shape[-1]
        rows = [F.pad(part, (0, width - part.shape[-1])).to(states.dtype) for part in (pooled, hidden)]
        return torch.cat([*rows, states], dim=1)

    def _padded(self, index: int, texts: list[str], length: int) -> Tensor:
        encoded = self.tokenizers[index](
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids
