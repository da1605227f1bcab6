"""Training, validation and test prompts, from the source that a recipe names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from fewstep.config.sections import PromptSettings
from fewstep.core.registry import load_plugins, prompt_sources
from fewstep.data.prompt_shards import PromptShards
from fewstep.errors import UserError

PromptSplit = Literal["train", "validation", "test"]


class PromptSource(Protocol):
    """Prompts to train on, to select models with, and to report results on."""

    def texts(self, split: PromptSplit) -> Sequence[str]:
        """The prompts of a split in a fixed order. No prompt is in two splits; validation and test may be empty."""
        ...


def open_prompts(settings: PromptSettings) -> PromptSource:
    """The source that ``settings.source`` names: a registered prompt source, else a text file or a folder of encoded
    prompts.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    load_plugins()
    name = settings.source if settings.source in prompt_sources else "file"
    source: PromptSource = prompt_sources.get(name)(settings)
    return source


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a UTF-8 text file, one per line, without blank lines.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one per line")
    return prompts


@prompt_sources.register("file")
class FilePrompts:
    """A text file with one prompt per line, or a folder that ``fewstep encode-prompts`` wrote, which is read lazily.

    ``settings.validation_source`` and ``settings.test_source`` name further files or folders for these splits. Where
    one is null, ``settings.heldout_fraction`` of the different prompts of the source are held out for it. A hash of the
    text decides which: the choice depends neither on the order nor on the machine, and a prompt keeps its split when
    prompts are added to a long list. In a short list, each of the two parts has at least one prompt and less than half.
    A source of fewer than three different prompts, or a fraction of 0, holds nothing out: the part is empty.

    A text found in several of the splits is kept in one: test before validation before training. Opening a folder reads
    its texts once, to hash them; encoded features are only read when used.

    Raises:
        UserError: a file or folder cannot be read, or no prompt is left for training.
    """

    def __init__(self, settings: PromptSettings) -> None:
        source = _open_texts(settings.source)
        hashes = _hash_texts(source)
        held_out = _held_out(hashes, settings.heldout_fraction)
        files = {"test": settings.test_source, "validation": settings.validation_source}
        used = np.empty(0, np.uint64)  # hashes of the prompts of the splits so far
        self._texts: dict[str, Sequence[str]] = {}
        for split, path in files.items():
            if path is None:
                texts, own = source, hashes
                chosen = np.isin(own, held_out[split]) & ~np.isin(own, used)
            else:
                texts = _open_texts(path)
                own = _hash_texts(texts)
                chosen = ~np.isin(own, used)
            self._texts[split] = _select(texts, chosen)
            used = np.concatenate([used, own[chosen]])
        self._texts["train"] = _select(source, ~np.isin(hashes, used))
        if not self._texts["train"]:
            raise UserError(
                f"{settings.source}: every prompt is a validation or test prompt; none is left for training"
            )

    def texts(self, split: PromptSplit) -> Sequence[str]:
        return self._texts[split]


def _open_texts(path: str) -> Sequence[str]:
    return PromptShards(path) if Path(path).is_dir() else read_prompts(path)


def _hash_texts(texts: Iterable[str]) -> np.ndarray:
    """uint64 [N], uniform over its range."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64)


def _held_out(hashes: np.ndarray, fraction: float) -> dict[str, np.ndarray]:
    """The hashes held out for validation, in the lowest ``fraction`` of their range, and for test, in the next; for
    each, at least one and less than half of the different prompts."""
    distinct = np.unique(hashes)
    most = (len(distinct) - 1) // 2
    if fraction == 0 or most < 1:
        return {"validation": distinct[:0], "test": distinct[:0]}
    bounds = np.array([int(fraction * 2**64), int(2 * fraction * 2**64)], np.uint64)
    below = np.searchsorted(distinct, bounds)
    validation = int(np.clip(below[0], 1, most))
    test = int(np.clip(below[1] - below[0], 1, most))
    return {"validation": distinct[:validation], "test": distinct[validation : validation + test]}


def _select(texts: Sequence[str], chosen: np.ndarray) -> Sequence[str]:
    """The texts where ``chosen`` (bool [N]) is true; encoded prompts stay on disk."""
    if chosen.all():
        return texts
    rows = np.flatnonzero(chosen)
    return texts.select(rows) if isinstance(texts, PromptShards) else [texts[row] for row in rows.tolist()]
