"""A list of prompts, each encoded once for all who need its features: kept in memory, or on disk if there are many.

Features stay in the text encoder's dtype. Up to ``MEMORY_BYTES`` of them are kept in memory; beyond that they are
written to shards in a folder that is named after the prompts and the text encoder, so that a resumed run, a later stage
and other processes read them there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts
from fewstep.data.encodable_texts import EncodableTexts
from fewstep.data.prompt_shards import PromptShards, is_finished, write_prompt_index, write_prompt_shard
from fewstep.data.trajectories import shard_file, text_fingerprint
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.text import PromptEncoder
from fewstep.progress import progress_bar

MEMORY_BYTES = 2**30
PART = 256  # prompts that are encoded together, and that a shard has


def encodable(model: TextToImagePipeline, prompts: Sequence[str], folder: Path | None = None) -> EncodableTexts:
    """Prompts as a model encodes them. Those on disk are read there.

    Args:
        folder: where features go that do not fit into memory; None keeps all in memory.

    Raises:
        UserError: prompts on disk were encoded by another text encoder; a prompt is too long, or not valid Unicode.
    """
    if isinstance(prompts, PromptShards):
        prompts.check(text_fingerprint(model.encoder))
        return prompts
    if isinstance(prompts, EncodableTexts):
        return prompts
    model.encoder.check(prompts)
    return TextPrompts(model.encoder, prompts, folder)


class _ListedTexts(EncodableTexts):
    """Prompts whose texts are a list in memory."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.texts[index]


class TextPrompts(_ListedTexts):
    """Texts with the encoder that encodes them when they are needed, or all at once with :meth:`stored`."""

    def __init__(self, encoder: PromptEncoder, texts: Sequence[str], folder: Path | None = None) -> None:
        self.encoder, self.texts, self.folder = encoder, list(texts), folder
        self._stored: EncodableTexts | None = None

    def select(self, rows: Sequence[int] | np.ndarray) -> EncodableTexts:
        if self._stored is not None:
            return self._stored.select(rows)
        return TextPrompts(self.encoder, [self.texts[row] for row in rows], self.folder)

    def encoded(self, rows: Sequence[int]) -> EncodedPrompts:
        if self._stored is not None:
            return self._stored.encoded(rows)
        return self.encoder([self.texts[row] for row in rows])

    def stored(self) -> EncodableTexts:
        if self._stored is None:
            self._stored = self._encode_all()
        return self._stored

    def _encode_all(self) -> EncodableTexts:
        if self.folder is not None and self.folder.exists():
            shards = self._shards_folder(self.folder)
            if shards.exists():
                return self._write(shards, [])
        kept: list[Tensor] = []
        size = 0
        with progress_bar(len(self), "prompts encoded") as advance:
            for start in range(0, len(self), PART):
                part = self.texts[start : start + PART]
                features = [feature.cpu() for feature in self.encoder.features(part)]
                kept += features
                size += sum(feature.nbytes for feature in features)
                advance(len(part))
                if self.folder is not None and size > MEMORY_BYTES:
                    return self._write(self._shards_folder(self.folder), kept)
        return FeatureList(self.texts, kept)

    def _write(self, folder: Path, features: Sequence[Tensor]) -> PromptShards:
        """Shards of all prompts, of which the first have ``features``; those that an interrupted run wrote are kept."""
        if is_finished(folder):
            return PromptShards(folder)
        counts = []
        with progress_bar(len(self), "prompts encoded to disk") as advance:
            for number, start in enumerate(range(0, len(self), PART)):
                part = self.texts[start : start + PART]
                if not shard_file(folder, number).exists():
                    found = features[start : start + PART]
                    write_prompt_shard(folder, number, part, found or self.encoder.features(part))
                counts.append(len(part))
                advance(len(part))
        write_prompt_index(folder, text_fingerprint(self.encoder), counts, {})
        return PromptShards(folder)

    def _shards_folder(self, folder: Path) -> Path:
        """Named after all that the features depend on."""
        made_from = json.dumps([text_fingerprint(self.encoder), self.texts])
        return folder / hashlib.blake2b(made_from.encode(), digest_size=8).hexdigest()


class FeatureList(_ListedTexts):
    """Prompts with their features [L_i, D] in memory."""

    def __init__(self, texts: Sequence[str], features: Sequence[Tensor]) -> None:
        self.texts, self.features = list(texts), list(features)

    def select(self, rows: Sequence[int] | np.ndarray) -> FeatureList:
        return FeatureList([self.texts[row] for row in rows], [self.features[row] for row in rows])

    def encoded(self, rows: Sequence[int]) -> EncodedPrompts:
        return EncodedPrompts.pad([self.features[row] for row in rows])

    def stored(self) -> FeatureList:
        return self
