"""From other people's prompt lists to shards of encoded prompts: cleaned, without duplicates, in flat memory.

What was seen, and how far it got, is kept in a small database beside the shards while it works; a shard and the step in
the database that counts it are one transaction, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fewstep.data.prompt_files import read_texts
from fewstep.data.prompt_shards import INDEX, write_prompt_index, write_prompt_shard
from fewstep.data.trajectories import shard_file, text_fingerprint
from fewstep.errors import UserError
from fewstep.models.text import MAX_TOKENS, PromptEncoder

SEEN = "seen.sqlite"

#: Script of a letter, by the first word of its Unicode name -> what is most likely written in it.
LANGUAGES = {
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
    """What became of the prompts that were read."""

    read: int = 0
    empty: int = 0
    duplicate: int = 0
    too_long: int = 0
    kept: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    def quantile(self, share: float) -> int:
        """The number of tokens that this share of the kept prompts does not exceed."""
        reached = 0
        for tokens, count in sorted(self.tokens.items()):
            reached += count
            if reached >= share * self.kept:
                return tokens
        return 0

    def summary(self) -> dict[str, Any]:
        names = ("read", "empty", "duplicate", "too_long", "kept")
        lengths = {"median": self.quantile(0.5), "95%": self.quantile(0.95), "longest": max(self.tokens, default=0)}
        counts = {name: getattr(self, name) for name in names}
        return counts | {"languages": dict(self.languages.most_common()), "tokens": lengths}

    def saved(self) -> dict[str, Any]:
        return {**vars(self), "languages": dict(self.languages), "tokens": dict(self.tokens)}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> CleaningStats:
        tokens = Counter({int(key): count for key, count in saved["tokens"].items()})
        return cls(**{**saved, "languages": Counter(saved["languages"]), "tokens": tokens})


def script_of(text: str) -> str:
    """What a prompt is most likely written in, by the script of most of its letters; kana settles for Japanese."""
    scripts = Counter(
        LANGUAGES.get(unicodedata.name(letter, "?").split(" ")[0].split("-")[0], "other")
        for letter in text
        if letter.isalpha()
    )
    if not scripts:
        return "no letters"
    return "Japanese" if scripts["Japanese"] else scripts.most_common(1)[0][0]


def normalize_prompt(text: str) -> str:
    """A prompt as it is kept: composed Unicode, white space of any kind as single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def prepare(
    sources: Sequence[str],
    encoder: PromptEncoder,
    out: Path,
    *,
    column: str = "prompt",
    max_tokens: int = MAX_TOKENS,
    shard_size: int = 1000,
    fresh: bool = False,
    progress: Callable[[CleaningStats], object] = lambda report: None,
) -> CleaningStats:
    """Reads, cleans and encodes prompts into ``out``; goes on where an interrupted call left off.

    Args:
        sources: see ``read_texts``.
        max_tokens: with the chat template; longer prompts are left out.
        progress: told the report so far, after each shard.

    Raises:
        UserError: a mistake in a source, other prompts in ``out``, or none left.
    """
    asked: dict[str, Any] = {
        "sources": list(sources),
        "column": column,
        "max_tokens": max_tokens,
        "shard_size": shard_size,
    }
    asked |= {"fingerprint": text_fingerprint(encoder)}
    if fresh and out.exists():
        _clear(out)
    if (out / INDEX).exists():
        raise UserError(f"{out}: finished prompts are there; use another --out, or --overwrite")
    texts = chain.from_iterable(read_texts(source, column) for source in sources)
    out.mkdir(parents=True, exist_ok=True)
    with closing(ProgressDB(out / SEEN, asked)) as ledger:
        report, counts = ledger.report, ledger.counts
        for kept in _batched(_clean(islice(texts, report.read, None), report, ledger, encoder, max_tokens), shard_size):
            write_prompt_shard(out, len(counts), kept, encoder.encode_uncached(kept))
            counts.append(len(kept))
            ledger.commit()
            progress(report)
        if not counts:
            raise UserError(f"{', '.join(sources)}: no prompt is left; {report.read} were read")
    write_prompt_index(out, asked["fingerprint"], counts, report.summary())
    (out / SEEN).unlink()
    return report


def _clean(
    texts: Iterable[str], report: CleaningStats, ledger: ProgressDB, encoder: PromptEncoder, max_tokens: int
) -> Iterator[str]:
    """The prompts to keep; what becomes of each is counted as it passes."""
    for text in texts:
        report.read += 1
        prompt = normalize_prompt(text)
        if not prompt:
            report.empty += 1
        elif not ledger.is_new(prompt):
            report.duplicate += 1
        elif (tokens := encoder.count(prompt)) > max_tokens:
            report.too_long += 1
        else:
            report.kept += 1
            report.tokens[tokens] += 1
            report.languages[script_of(prompt)] += 1
            yield prompt


def _batched(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of so many, the last one shorter; nothing is read before it is asked for."""
    while part := list(islice(texts, size)):
        yield part


class ProgressDB:
    """What was seen, and how far it got, on disk: memory stays flat however many prompts there are."""

    def __init__(self, file: Path, asked: Mapping[str, Any]) -> None:
        self.base = sqlite3.connect(file)
        try:
            self.base.execute("create table if not exists seen (digest blob primary key) without rowid")
            self.base.execute("create table if not exists state (content text)")
            found = self.base.execute("select content from state").fetchone()
        except sqlite3.DatabaseError as error:
            raise UserError(f"{file}: cannot be read ({error}); use --overwrite") from None
        saved: dict[str, Any] = {"asked": asked, "report": CleaningStats().saved(), "counts": []}
        if found:
            saved = json.loads(found[0])
        differing = [key for key, value in asked.items() if saved["asked"].get(key) != value]
        if differing:
            raise UserError(
                f"{file.parent}: prompts with another {', '.join(differing)} were begun there; use --overwrite"
            )
        self.asked, self.report = asked, CleaningStats.of(saved["report"])
        self.counts: list[int] = saved["counts"]

    def is_new(self, text: str) -> bool:
        """Whether the text comes for the first time; it is not, from then on."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return self.base.execute("insert or ignore into seen values (?)", (digest,)).rowcount > 0

    def commit(self) -> None:
        content = json.dumps({"asked": self.asked, "report": self.report.saved(), "counts": self.counts})
        self.base.execute("delete from state")
        self.base.execute("insert into state values (?)", (content,))
        self.base.commit()

    def close(self) -> None:
        self.base.close()


def _clear(out: Path) -> None:
    """Deletes what a run of this kind left in a folder; anything else there is refused."""
    own = {INDEX, SEEN, f"{SEEN}-journal"}
    for path in out.iterdir():
        if path.name not in own and path.name != shard_file(out, 0).name and not path.name.startswith("shard-"):
            raise UserError(f"{path} is no work of fewstep prompts; use another --out")
    shutil.rmtree(out)
