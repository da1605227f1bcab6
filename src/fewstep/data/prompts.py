"""Training, validation and test prompts, from the source that a recipe names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from fewstep.config.sections import PromptSettings
from fewstep.core.registry import load_plugins, prompt_sources
from fewstep.data.prompt_files import read_prompts
from fewstep.data.prompt_shards import PromptShards, is_encoded
from fewstep.data.prompt_stream import PromptStream, TrainingPrompts, listed
from fewstep.data.prompt_text import comparison_key
from fewstep.errors import UserError

PromptSplit = Literal["train", "validation", "test"]


class PromptSource(Protocol):
    """Prompts to train on, to select models with, and to report results on."""

    def texts(self, split: PromptSplit) -> Sequence[str]:
        """The prompts of a split in a fixed order. No prompt is in two splits; validation and test may be empty.

        Raises:
            UserError: the training prompts are a stream; :func:`training_prompts` gives it.
        """
        ...


def open_prompts(settings: PromptSettings) -> PromptSource:
    """The source that ``settings.source`` names: a registered prompt source, else files, a dataset or encoded prompts.
    With ``settings.stream``, files or a dataset are read as they are needed.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    load_plugins()
    name = settings.source if settings.source in prompt_sources else "file"
    if settings.stream is not None:
        if name != "file" or is_encoded(settings.source):
            raise UserError(
                f"prompts.source={settings.source}: not a file, folder or dataset of texts, as prompts.stream needs; "
                "set prompts.stream=null"
            )
        return StreamPrompts(settings)
    source: PromptSource = prompt_sources.get(name)(settings)
    return source


@prompt_sources.register("file")
class FilePrompts:
    """Whatever :func:`read_texts` reads, or a folder that ``fewstep encode-prompts`` wrote, which is read lazily.

    ``settings.validation_source`` and ``settings.test_source`` name further files or folders for these splits. Where
    one is null, ``settings.heldout_fraction`` of the different prompts of the source are held out for it. A hash of the
    text decides which: the choice depends neither on the order nor on the machine, and a prompt keeps its split when
    prompts are added to a long list. In a short list, each of the two parts has at least one prompt and less than half,
    and the test part at least two where there are five different prompts.
    A source of fewer than three different prompts, or a fraction of 0, holds nothing out: the part is empty.

    A text found in several of the splits is kept in one, test before validation before training, with a warning where
    the user named the file. Texts that differ only in case, white space or compatibility forms count as the same.
    Opening a folder reads its texts once, to hash them; encoded features are only read when used.

    Raises:
        UserError: a file or folder cannot be read, or no prompt is left for training.
    """

    def __init__(self, settings: PromptSettings) -> None:
        source = _open_texts(settings.source, settings.column)
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
                texts = _open_texts(path, settings.column)
                own = _hash_texts(texts)
                chosen = ~np.isin(own, used)
                _warn_of_overlap(path, split, int((~chosen).sum()), int(np.isin(own[chosen], hashes).sum()))
            self._texts[split] = _select(texts, chosen)
            used = np.concatenate([used, own[chosen]])
        self._texts["train"] = _select(source, ~np.isin(hashes, used))
        if not self._texts["train"]:
            raise UserError(
                f"{settings.source}: every prompt is a validation or test prompt; none is left for training"
            )

    def texts(self, split: PromptSplit) -> Sequence[str]:
        return self._texts[split]


class StreamPrompts:
    """Training prompts that are read as a stream; the validation and test prompts are those of
    ``settings.validation_source`` and ``settings.test_source``, and the stream leaves them out.

    Raises:
        UserError: a file or folder cannot be read, or a package is missing.
    """

    def __init__(self, settings: PromptSettings) -> None:
        assert settings.stream is not None
        test, validation = (
            [] if path is None else _open_texts(path, settings.column)
            for path in (settings.test_source, settings.validation_source)
        )
        tested = {comparison_key(text) for text in test}
        kept = [text for text in validation if comparison_key(text) not in tested]
        if len(kept) < len(validation):
            _warn_of_overlap(str(settings.validation_source), "validation", len(validation) - len(kept), 0)
        self._texts: dict[str, Sequence[str]] = {"test": test, "validation": kept}
        held_out = frozenset(tested | {comparison_key(text) for text in kept})
        self.train = PromptStream(settings.source, settings.column, settings.stream, held_out)
        _ = self.train.rows  # a mistake here is reported at once

    def texts(self, split: PromptSplit) -> Sequence[str]:
        return listed(self.train) if split == "train" else self._texts[split]


def training_prompts(source: PromptSource) -> TrainingPrompts:
    """The prompts of a source that are trained on."""
    return source.train if isinstance(source, StreamPrompts) else source.texts("train")


def checked_prompts(source: PromptSource) -> Sequence[str]:
    """The training prompts that :func:`check_held_out` has to check: none of a stream, which leaves out what is held
    out."""
    return [] if isinstance(source, StreamPrompts) else source.texts("train")


def check_held_out(training: Mapping[str, Iterable[str]], validation: Sequence[str], test: Sequence[str]) -> None:
    """Check what no single source can: that nothing trains on the prompts that a run is measured on.

    Args:
        training: training prompts by the recipe's key, or the folder, that they come from.

    Raises:
        UserError: a validation prompt is a test prompt, or a training prompt is one of both.
    """
    tested = {comparison_key(text): "test" for text in test}
    validated = {comparison_key(text): "validation" for text in validation}
    for where, texts, held_out in [
        ("prompts", validation, tested),
        *((where, texts, validated | tested) for where, texts in training.items()),
    ]:
        shared = [text for text in texts if comparison_key(text) in held_out]
        if shared:
            found, used_as = shared[0], held_out[comparison_key(shared[0])]
            raise UserError(
                f"{where}: {len(shared)} prompts are also {used_as} prompts, such as {found[:60]!r}; leave them out "
                "there, or name other files in prompts.validation_source and prompts.test_source"
            )


def _warn_of_overlap(path: str, split: str, tested: int, trained: int) -> None:
    if tested:
        warnings.warn(
            f"{path}: {tested} {split} prompts are also test prompts; they are used for test only", stacklevel=1
        )
    if trained:
        warnings.warn(
            f"{path}: {trained} {split} prompts are also in prompts.source; they are not trained on", stacklevel=1
        )


def _open_texts(source: str, column: str) -> Sequence[str]:
    return PromptShards(source) if is_encoded(source) else read_prompts(source, column)


def _hash_texts(texts: Iterable[str]) -> np.ndarray:
    """uint64 [N], uniform over its range; equal for prompts that count as the same."""
    digests = (hashlib.blake2b(comparison_key(text).encode(), digest_size=8).digest() for text in texts)
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
    test = int(np.clip(below[1] - below[0], min(2, most), most))  # an evaluation needs two
    return {"validation": distinct[:validation], "test": distinct[validation : validation + test]}


def _select(texts: Sequence[str], chosen: np.ndarray) -> Sequence[str]:
    """The texts where ``chosen`` (bool [N]) is true; encoded prompts stay on disk."""
    if chosen.all():
        return texts
    rows = np.flatnonzero(chosen)
    return texts.select(rows) if isinstance(texts, PromptShards) else [texts[row] for row in rows.tolist()]
