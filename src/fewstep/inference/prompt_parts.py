"""A long list of prompts, encoded part by part while its images are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.core.batching import batched
from fewstep.core.conditioning import EncodedPrompts
from fewstep.models.pipeline import TextToImagePipeline

PART = 128  # prompts encoded together: few moves of an offloaded text encoder, and at most 0.7 GB for Z-Image


class PromptParts:
    """Slices of the encoded prompts, taken in ascending order; only one part is in memory.

    Args:
        system, assistant_prefix: as for ``pipeline.encode``.

    Raises:
        UserError: any of the prompts is too long, or not valid Unicode.
    """

    def __init__(
        self, pipeline: TextToImagePipeline, prompts: Sequence[str], system: str | None, assistant_prefix: str
    ) -> None:
        self.pipeline, self.prompts, self.system, self.assistant_prefix = pipeline, prompts, system, assistant_prefix
        self._range, self._part = range(0), EncodedPrompts(torch.empty(0, 0, 0), torch.empty(0))
        pipeline.encoder.check(prompts, system=system, assistant_prefix=assistant_prefix)

    def __getitem__(self, wanted: slice) -> EncodedPrompts:
        first, stop, _ = wanted.indices(len(self.prompts))
        if first not in self._range or stop > self._range.stop:
            self._range = range(first, max(stop, min(first + PART, len(self.prompts))))
            texts = self.prompts[self._range.start : self._range.stop]
            # On a CPU each prompt alone: its last bits would depend on the others of a batch, and on their lengths.
            size = 1 if self.pipeline.device.type == "cpu" else PART
            self._part = EncodedPrompts.concat([self._encode(texts[some]) for some in batched(len(texts), size)])
        return self._part[first - self._range.start : stop - self._range.start]

    def _encode(self, texts: Sequence[str]) -> EncodedPrompts:
        return self.pipeline.encode(texts, system=self.system, assistant_prefix=self.assistant_prefix)
