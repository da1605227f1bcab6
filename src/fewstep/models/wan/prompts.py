"""Wan's prompts: UMT5's last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from fewstep.core.precision import without_autocast
from fewstep.errors import UserError
from fewstep.models.text import PromptEncoder

TOKENS = 512  # that the transformer attends to; longer prompts are refused, diffusers truncates them


class WanPromptEncoder(PromptEncoder):
    """Prompts without a template, cleaned as by diffusers: HTML entities and runs of whitespace, and what ftfy mends
    where it is installed."""

    def template(self, text: str, *, system: str | None = None, assistant_prefix: str = "") -> str:
        parts = {"system_prompt": self.system if system is None else system, "assistant_prefix": assistant_prefix}
        for name, value in parts.items():
            if value:
                raise UserError(f"{name}: prompts of WanPipeline have no such part; leave it out")
        return str(prompt_clean(text))

    def _encode_batch(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        device = next(self.text_encoder.parameters()).device
        ids, mask = (
            nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
            for rows in (tokens, [row.new_ones(len(row)) for row in tokens])
        )
        with without_autocast(device):  # cached features must not depend on the caller's autocast
            features = self.text_encoder(ids, mask).last_hidden_state
        return [feature[: len(row)].clone() for feature, row in zip(features, tokens, strict=True)]
