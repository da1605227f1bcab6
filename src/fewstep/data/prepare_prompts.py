"""From prompt lists to shards of encoded prompts: cleaned, without duplicates, in constant memory.

Which prompts were read, and how far the work got, is kept in a small database beside the shards; a shard and the
database row that counts it are one transaction, so an interrupted call resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fewstep.atomic import is_litter
from fewstep.data.prompt_files import read_texts
from fewstep.data.prompt_shards import INDEX, write_prompt_index, write_prompt_shard
from fewstep.data.trajectories import text_fingerprint
from fewstep.errors import UserError
from fewstep.machine import read_error, reading, write_error, writing
from fewstep.models.text import MAX_TOKENS, PromptEncoder
from fewstep.outputs import claimed_folder

PROGRESS = "seen.sqlite"

#: First word of a letter's Unicode name -> the script, or the language where one is most likely.
SCRIPTS = {
    "LATIN": "Latin script",
    "CJK": "Chinese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script",
    "DEVANAGARI": "Devanagari",
    "GREEK": "Greek",
    "HEBREW": "Hebrew",
    "THAI": "Thai",
}


@dataclass
class CleaningStats:
    """How many prompts were read, left out for which reason, and kept."""

    read: int = 0
    empty: int = 0
    duplicate: int = 0
    too_long: int = 0
    kept: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    def quantile(self, fraction: float) -> int:
        """The smallest number of tokens that this fraction of the kept prompts does not exceed."""
        reached = 0
        for tokens, count in sorted(self.tokens.items()):
            reached += count
            if reached >= fraction * self.kept:
                return tokens
        return 0

    def summary(self) -> dict[str, Any]:
        names = ("read", "empty", "duplicate", "too_long", "kept")
        lengths = {"median": self.quantile(0.5), "95%": self.quantile(0.95), "longest": max(self.tokens, default=0)}
        counts = {name: getattr(self, name) for name in names}
        return counts | {"languages": dict(self.languages.most_common()), "tokens": lengths}

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "languages": dict(self.languages), "tokens": dict(self.tokens)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> CleaningStats:
        tokens = Counter({int(key): count for key, count in saved["tokens"].items()})
        return cls(**{**saved, "languages": Counter(saved["languages"]), "tokens": tokens})


def script_of(text: str) -> str:
    """The script of most letters of a text, or the most likely language; a single kana makes it Japanese."""
    scripts = Counter(
        SCRIPTS.get(unicodedata.name(letter, "?").split(" ")[0].split("-")[0], "other")
        for letter in text
        if letter.isalpha()
    )
    if not scripts:
        return "no letters"
    return "Japanese" if scripts["Japanese"] else scripts.most_common(1)[0][0]


def check_before_loading(sources: Sequence[str], column: str, out: Path, overwrite: bool) -> None:
    """Find, before a model is loaded, what :func:`prepare_prompts` would refuse; nothing is written or deleted.

    Raises:
        UserError: a source whose first prompt cannot be read, finished prompts in ``out``, or, with ``overwrite``,
            other files.
    """
    if overwrite:
        _own_files(out)
    elif (out / INDEX).exists():
        raise UserError(f"{out} already holds encoded prompts; use another --out, or --overwrite")
    for source in sources:
        next(read_texts(source, column), None)


def prepare_prompts(
    sources: Sequence[str],
    encoder: PromptEncoder,
    out: Path,
    *,
    column: str = "prompt",
    max_tokens: int = MAX_TOKENS,
    shard_size: int = 1000,
    overwrite: bool = False,
    progress: Callable[[CleaningStats], object] = lambda stats: None,
) -> CleaningStats:
    """Read, clean and encode prompts into ``out``; resumes an interrupted call.

    Args:
        sources: see ``read_texts``.
        max_tokens: with the chat template; longer prompts are left out.
        overwrite: delete prompts that are in ``out`` already.
        progress: called with the statistics so far, after each shard.

    Raises:
        UserError: a mistake in a source, other prompts in ``out``, or no prompt is left.
    """
    settings: dict[str, Any] = {
        "sources": list(sources),
        "column": column,
        "max_tokens": max_tokens,
        "shard_size": shard_size,
        "fingerprint": text_fingerprint(encoder),
    }
    with claimed_folder(out):
        check_before_loading(sources, column, out, overwrite)
        if overwrite:
            for path in _own_files(out):  # the folder stays: it is locked
                path.unlink()
        return _prepare(settings, encoder, out, progress)


def _prepare(
    settings: Mapping[str, Any], encoder: PromptEncoder, out: Path, progress: Callable[[CleaningStats], object]
) -> CleaningStats:
    sources, max_tokens, shard_size = settings["sources"], settings["max_tokens"], settings["shard_size"]
    texts = chain.from_iterable(read_texts(source, settings["column"]) for source in sources)
    with closing(ProgressDB(out / PROGRESS, settings)) as database:
        stats, counts = database.stats, database.counts
        unread = islice(texts, stats.read, None)
        try:
            for prompts in _batched(_clean(unread, stats, database, encoder, max_tokens), shard_size):
                write_prompt_shard(out, len(counts), prompts, encoder.encode_uncached(prompts))
                counts.append(len(prompts))
                database.commit()
                progress(stats)
            if not counts:
                raise UserError(f"{', '.join(sources)}: none of the {stats.read} prompts was kept")
        except UserError:
            if not counts:  # nothing to resume: the corrected command may have other settings
                database.close()
                (out / PROGRESS).unlink()
            raise
    write_prompt_index(out, settings["fingerprint"], counts, stats.summary())
    (out / PROGRESS).unlink()
    return stats


def _clean(
    texts: Iterable[str], stats: CleaningStats, database: ProgressDB, encoder: PromptEncoder, max_tokens: int
) -> Iterator[str]:
    """The prompts to keep; ``stats`` counts every prompt as it passes."""
    for text in texts:
        stats.read += 1
        if not text:
            stats.empty += 1
        elif not database.add_if_new(text):
            stats.duplicate += 1
        elif (tokens := encoder.count(text)) > max_tokens:
            stats.too_long += 1
        else:
            stats.kept += 1
            stats.tokens[tokens] += 1
            stats.languages[script_of(text)] += 1
            yield text


def _batched(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of ``size`` texts, the last one shorter, read lazily."""
    while part := list(islice(texts, size)):
        yield part


class ProgressDB:
    """The prompts read so far, as hashes, and the progress, on disk: memory stays constant."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        self.connection = self._opened()
        with reading(file, "use --overwrite"):
            row = self.connection.execute("select content from state").fetchone()
        saved = json.loads(row[0]) if row else {}
        started_with = saved.get("settings", settings)
        changed = [key for key, value in settings.items() if started_with.get(key) != value]
        if changed:
            raise UserError(
                f"{file.parent} holds unfinished prompts with another {', '.join(changed)}; use another --out, or "
                "--overwrite"
            )
        self.settings = settings
        self.stats = CleaningStats.from_json(saved["stats"]) if saved else CleaningStats()
        self.counts: list[int] = saved.get("counts", [])

    def _opened(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.file)
            connection.execute("create table if not exists seen (digest blob primary key) without rowid")
            connection.execute("create table if not exists state (content text)")
        except sqlite3.OperationalError as error:  # locked, read-only, no space
            raise write_error(self.file, error, "the same command resumes") from error
        except sqlite3.DatabaseError as error:
            raise read_error(self.file, error, "use --overwrite") from error
        return connection

    def add_if_new(self, text: str) -> bool:
        """Whether the text was not in the database; it is from then on."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with writing(self.file, "the same command resumes"):
            return self.connection.execute("insert or ignore into seen values (?)", (digest,)).rowcount > 0

    def commit(self) -> None:
        content = json.dumps({"settings": self.settings, "stats": self.stats.to_json(), "counts": self.counts})
        with writing(self.file, "the same command resumes"):
            self.connection.execute("delete from state")
            self.connection.execute("insert into state values (?)", (content,))
            self.connection.commit()

    def close(self) -> None:
        self.connection.close()


def _own_files(out: Path) -> list[Path]:
    """What an earlier call left in a folder. Raises: UserError for any other file there."""
    own, found = {INDEX, PROGRESS, f"{PROGRESS}-journal"}, list(out.iterdir())
    for path in found:
        if path.name not in own and not path.name.startswith("shard-") and not is_litter(path):
            raise UserError(f"{path} was not written by fewstep encode-prompts; use another --out")
    return found
