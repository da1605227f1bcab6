"""Encoded prompts on disk, in numbered shards; only the requested prompts are read.

    index.json              fingerprint of the text encoder, prompts in each shard, statistics of the cleaning
    shard-00000.safetensors features [tokens, D] of all its prompts in a row, ends [n]; their texts as metadata

Prompts that another text encoder or prompt template encoded are refused, never silently used.
"""

from __future__ import annotations

import bisect
import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.atomic import write_tensors, write_text
from fewstep.core.conditioning import EncodedPrompts
from fewstep.data.encodable_texts import EncodableTexts
from fewstep.data.trajectories import check_fingerprint, shard_file
from fewstep.errors import UserError
from fewstep.machine import read_error, reading

FORMAT = 1
INDEX = "index.json"
KIND = "prompts"
_DAMAGED = "missing or damaged, run fewstep encode-prompts --overwrite"


def write_prompt_shard(folder: Path, number: int, texts: Sequence[str], features: Sequence[Tensor]) -> None:
    """Write a shard of prompts and their features [L_i, D]; the file is complete or absent."""
    ends = torch.tensor(list(accumulate(len(feature) for feature in features)))
    tensors = {"features": torch.cat(list(features)), "ends": ends}
    write_tensors(shard_file(folder, number), tensors, {"prompts": json.dumps(list(texts), ensure_ascii=False)})


def write_prompt_index(
    folder: Path, fingerprint: Mapping[str, object], counts: Sequence[int], report: Mapping[str, Any]
) -> None:
    """Write the index, which makes the folder complete."""
    index = {"format": FORMAT, "kind": KIND, "fingerprint": fingerprint, "counts": list(counts), "report": report}
    write_text(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))


def is_encoded(path: str | Path) -> bool:
    """Whether a folder has, or once had, encoded prompts: an index, or shards without one."""
    folder = Path(path)
    try:
        return is_finished(folder) or shard_file(folder, 0).exists()
    except OSError:  # a name that is too long, a folder without permission: whoever reads it reports it
        return False


def is_finished(folder: Path) -> bool:
    """Whether all prompts of a folder are encoded: the index is written last."""
    return (folder / INDEX).exists()


class PromptShards(EncodableTexts):
    """The prompts of a folder as a sequence of texts; :meth:`encoded` gives their features.

    Raises:
        UserError: the folder holds no finished prompts, or they cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            if "samples" in index:
                raise UserError(f"{folder}: trajectories, not prompts; name it in trajectory.cache")
            if index["format"] != FORMAT or index["kind"] != KIND:
                raise ValueError("another kind or format")
            self.fingerprint, self._ends = index["fingerprint"], list(accumulate(index["counts"]))
            self._rows: Sequence[int] | np.ndarray = range(self._ends[-1] if self._ends else 0)
        except FileNotFoundError:
            raise UserError(
                f"{folder}: no encoded prompts in it; make them with fewstep encode-prompts, or resume it"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / INDEX}: cannot be read ({error})") from None
        self._open = lru_cache(maxsize=16)(self._open_shard)
        self._texts = lru_cache(maxsize=16)(self._read_texts)

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, rows: Sequence[int] | np.ndarray) -> PromptShards:
        """The prompts with these numbers, as another sequence over the same files."""
        selected = copy.copy(self)
        selected._rows = np.asarray(self._rows)[rows]
        return selected

    def stored(self) -> PromptShards:
        return self

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, row = self._place(index)
        return self._texts(shard)[row]

    def check(self, fingerprint: Mapping[str, object]) -> None:
        """Raises: UserError if the prompts were encoded by another text encoder or template."""
        check_fingerprint(self.folder, fingerprint, self.fingerprint)

    def encoded(self, rows: Sequence[int]) -> EncodedPrompts:
        """The encoded prompts with these numbers, in fp32."""
        features = []
        for index in rows:
            shard, row = self._place(index)
            tensors, ends = self._open(shard)
            begin = ends[row - 1] if row else 0
            with reading(shard_file(self.folder, shard), _DAMAGED):
                features.append(tensors.get_slice("features")[begin : ends[row]])
        return EncodedPrompts.pad(features)

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and row of a prompt."""
        index = int(self._rows[index])
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _open_shard(self, shard: int) -> tuple[Any, list[int]]:
        file = shard_file(self.folder, shard)
        with reading(file, _DAMAGED):
            tensors = safe_open(file, "pt")
            return tensors, tensors.get_tensor("ends").tolist()

    def _read_texts(self, shard: int) -> list[str]:
        try:
            return json.loads(self._open(shard)[0].metadata()["prompts"])
        except (ValueError, KeyError, TypeError) as error:
            raise read_error(shard_file(self.folder, shard), error, _DAMAGED) from None
