"""What is checked in a training set: each check with its threshold and the images that it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fewstep.data.training_set.captions import shot
from fewstep.data.training_set.faces import shot_of
from fewstep.data.training_set.measures import near_duplicates

Level = Literal["ok", "note", "warning", "not checked"]

#: Shares of shots that guides advise for a character.
ADVISED_SHOTS: Mapping[str, tuple[float, float]] = {
    "close-up": (0.40, 0.50),
    "medium": (0.30, 0.40),
    "full-body": (0.10, 0.20),
}


@dataclass(frozen=True)
class Thresholds:
    """Attributes: see the checks that :func:`run_checks` makes; they are the page's too."""

    least_count: int = 20
    advised_count: tuple[int, int] = (70, 80)
    advised_edge: int = 1024
    least_sharpness: float = 40.0
    most_grain: float = 6.0
    duplicate_bits: int = 8
    least_confidence: float = 0.6
    most_tokens: int = 512


@dataclass
class ImageRecord:
    """One image of a set.

    Attributes:
        source: its file, relative to the folder that was read.
        name: of the file that was written.
        width, height: of the original, upright, in pixels.
        size: (width, height) of the written image.
        own: the user's caption, "" if there was none.
        caption: the written one.
        texts: found in it; None if they were not looked for.
        tokens: of the caption; None without a tokenizer.
        faces: widths of the faces over the image's height, largest first; None if they were not looked for.
    """

    source: str
    name: str
    width: int
    height: int
    size: tuple[int, int]
    own: str
    caption: str
    sharpness: float
    grain: float
    code: int
    texts: list[str] | None = None
    tokens: int | None = None
    faces: list[float] | None = None


@dataclass(frozen=True)
class Check:
    """A check's outcome.

    Attributes:
        threshold: in words.
        found: what was found, in words.
        files: the images that it names, or groups of them.
    """

    name: str
    threshold: str
    level: Level
    found: str
    files: Sequence[str] = field(default_factory=tuple)


def run_checks(
    records: Sequence[ImageRecord], unreadable: Mapping[str, str], orphans: Sequence[str], side: int, limits: Thresholds
) -> list[Check]:
    """All checks.

    Args:
        unreadable: files that were left out, with the reason.
        orphans: images that a metadata file names and that are not there.
        side: pixels of a square bucket.
    """
    checks = [
        _files(unreadable),
        _count(len(records), limits),
        _named(
            "resolution for training",
            f"not smaller than {side} px crops",
            "smaller, and not enlarged",
            [f"{one.source} ({one.width} x {one.height})" for one in records if _is_small(one, side)],
        ),
        _named(
            "longest edge",
            f"at least {limits.advised_edge} px",
            "shorter",
            [one.source for one in records if max(one.width, one.height) < limits.advised_edge],
            "note",
        ),
        _named(
            "blur",
            f"variance of the Laplacian at 512 px at least {limits.least_sharpness:g}",
            "blurred",
            [f"{one.source} ({one.sharpness:.1f})" for one in records if one.sharpness < limits.least_sharpness],
        ),
        _named(
            "grain",
            f"noise at most {limits.most_grain:g} of 255 levels",
            "grainy",
            [f"{one.source} ({one.grain:.1f})" for one in records if one.grain > limits.most_grain],
        ),
        _duplicates(records, limits),
        _texts(records, limits),
        *_people(records),
        _named(
            "captions",
            "every image has one",
            "without a caption",
            [one.source for one in records if not one.caption],
        ),
        _named("captions of missing images", "none", "not there", orphans),
        _tokens(records, limits),
        _shots(records),
    ]
    return [check for check in checks if check is not None]


def _named(name: str, threshold: str, what: str, files: Sequence[str], level: Level = "warning") -> Check:
    """A check that is passed where it names no file."""
    return Check(name, threshold, level if files else "ok", f"{len(files)} {what}" if files else "", files)


def _is_small(record: ImageRecord, side: int) -> bool:
    return record.size[0] * record.size[1] < 0.9 * side**2


def _files(unreadable: Mapping[str, str]) -> Check:
    files = [f"{name}: {why}" for name, why in unreadable.items()]
    return _named("files", "can be opened", "left out", files)


def _count(count: int, limits: Thresholds) -> Check:
    low, high = limits.advised_count
    threshold = f"at least {limits.least_count}; {low} to {high} are advised for a character"
    level: Level = "warning" if count < limits.least_count else "ok" if low <= count <= high else "note"
    return Check("count", threshold, level, f"{count} images")


def _duplicates(records: Sequence[ImageRecord], limits: Thresholds) -> Check:
    groups = near_duplicates([one.code for one in records], limits.duplicate_bits)
    files = [" = ".join(records[index].source for index in group) for group in groups]
    threshold = f"more than {limits.duplicate_bits} of 64 bits of the perceptual hash differ"
    what = "group of near-duplicates" if len(files) == 1 else "groups of near-duplicates"
    return _named("near-duplicates", threshold, what, files)


def _texts(records: Sequence[ImageRecord], limits: Thresholds) -> Check:
    threshold = f"none with a confidence of at least {limits.least_confidence:g} (RapidOCR)"
    if any(one.texts is None for one in records):
        return Check("text and watermarks", threshold, "not checked", "give --check-text")
    files = [f"{one.source}: {' | '.join(one.texts)[:80]}" for one in records if one.texts]
    return _named("text and watermarks", threshold, "with text", files)


def _people(records: Sequence[ImageRecord]) -> list[Check]:
    several = "one person; faces at least half as wide as the largest one count"
    if any(one.faces is None for one in records):
        return [Check("people", several, "not checked", "give --check-people")]
    crowds = [f"{one.source} ({len(one.faces)} faces)" for one in records if one.faces and len(one.faces) > 1]
    none = [one.source for one in records if not one.faces]
    return [
        _named("people", several, "with several people", crowds),
        _named("faces", "a frontal face is found", "without one", none, "note"),
    ]


def _tokens(records: Sequence[ImageRecord], limits: Thresholds) -> Check:
    threshold = f"at most {limits.most_tokens} tokens"
    counts = [one.tokens for one in records if one.tokens is not None]
    if len(counts) < len(records):
        return Check("caption length", threshold, "not checked", "give --model, whose tokenizer counts")
    long = [f"{one.source} ({one.tokens})" for one in records if (one.tokens or 0) > limits.most_tokens]
    if long:
        return _named("caption length", threshold, "longer", long)
    return Check("caption length", threshold, "ok", f"{min(counts)} to {max(counts)} tokens")


def _shots(records: Sequence[ImageRecord]) -> Check:
    advised = ", ".join(f"{name} {100 * low:.0f} to {100 * high:.0f}%" for name, (low, high) in ADVISED_SHOTS.items())
    threshold = f"advised for a character: {advised}"
    kinds = [kind for one in records if (kind := shot(one.own)) is not None]
    if 2 * len(kinds) < len(records):
        by_face = [shot_of(one.faces[0]) for one in records if one.faces]
        if 2 * len(by_face) < len(records):
            found = f"{len(kinds)} of {len(records)} captions name the kind of shot"
            return Check("shots", threshold, "not checked", found)
        kinds, threshold = by_face, f"{threshold}; by the size of the largest face"
    counts = Counter(kinds)
    shares = {name: counts[name] / len(kinds) for name in ADVISED_SHOTS}
    fits = all(low <= shares[name] <= high for name, (low, high) in ADVISED_SHOTS.items())
    found = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
    return Check("shots", threshold, "ok" if fits else "note", found)
