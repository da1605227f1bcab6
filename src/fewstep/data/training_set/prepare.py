"""Makes a training set of a folder of images.

    images/00001-name.png, .txt   the crops with their captions
    metadata.jsonl                the same captions, as Hugging Face's imagefolder has them, with sizes and buckets
    dataset.yaml                  what training takes
    report.html, sheet-01.jpg     the checks, and all images small

Originals are only read. One image per worker is in memory, and one page of small ones.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image

from fewstep.atomic import atomic_folder, is_litter
from fewstep.data.training_set.buckets import Fit, crop_to, target_size
from fewstep.data.training_set.captions import CaptionRule, caption_beside, read_captions
from fewstep.data.training_set.checks import Check, ImageRecord, Thresholds, run_checks
from fewstep.data.training_set.faces import FindFaces
from fewstep.data.training_set.measures import grain, perceptual_hash, sharpness
from fewstep.data.training_set.opening import SUFFIXES, Unreadable, open_rgb
from fewstep.data.training_set.sheet import TILE, ContactSheet
from fewstep.data.training_set.texts import FindText
from fewstep.errors import UserError
from fewstep.pages.render import render_page
from fewstep.progress import progress_bar

_WORKERS = min(4, os.cpu_count() or 1)
_SHOWN = 100  # files of a check on the page
_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class PrepareSettings:
    """How a set is made.

    Attributes:
        side: pixels of a square crop.
        fit: how crops are chosen (``buckets.target_size``).
        rule: of the captions.
        limits: of the checks.
        find_text: finds text in an image; None: it is not looked for.
        count_tokens: of a caption; None: they are not counted.
        find_faces: finds faces in an image; None: they are not looked for.
    """

    side: int = 1024
    fit: Fit = "buckets"
    rule: CaptionRule = field(default_factory=CaptionRule)
    limits: Thresholds = field(default_factory=Thresholds)
    find_text: FindText | None = None
    count_tokens: Callable[[str], int] | None = None
    find_faces: FindFaces | None = None


@dataclass(frozen=True)
class _Source:
    index: int
    file: Path
    own: str


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and of those in it, by their endings, in the order of their names.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    inside = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    hidden = (path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    files = sorted(path for path in hidden if not is_litter(path))
    if not files:
        raise UserError(f"{folder}: no images in it (.jpg, .png, .webp, ...)")
    return files


def prepare(folder: Path, out: Path, settings: PrepareSettings) -> tuple[list[Check], int]:
    """Make a set at ``out``, which appears complete or not at all; returns the checks and the number of images.

    Raises:
        UserError: there are no images, or none that can be opened; captions cannot be read; or ``out`` is in the
            folder, or cannot be written.
    """
    files = list_images(folder)
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out}: is in {folder}, and would be taken for images there; use a folder outside of it")
    captions = read_captions(folder)
    sources = [_Source(index, file, _own_caption(file, captions)) for index, file in enumerate(files, 1)]
    orphans = sorted(str(path.relative_to(folder)) for path in captions if not path.is_file())
    with atomic_folder(out) as draft:
        (draft / "images").mkdir()
        records, unreadable, sheet = list[ImageRecord](), dict[str, str](), ContactSheet(draft)
        for source, result in _processed(sources, folder, draft / "images", settings):
            if isinstance(result, Unreadable):
                unreadable[str(source.file.relative_to(folder))] = str(result)
            else:
                record, tile = result
                records.append(record)
                sheet.add(tile, record.name[:24])
        sheet.close()
        if not records:
            name, why = next(iter(unreadable.items()))
            raise UserError(f"{folder}: none of its {len(files)} images can be opened ({name}: {why})")
        checks = run_checks(records, unreadable, orphans, settings.side, settings.limits)
        _write(draft, folder, records, checks, [page.name for page in sheet.pages], settings)
    return checks, len(records)


def _own_caption(file: Path, captions: Mapping[Path, str]) -> str:
    beside = caption_beside(file)
    return captions.get(file, "") if beside is None else beside


def _processed(
    sources: Sequence[_Source], folder: Path, images: Path, settings: PrepareSettings
) -> Iterator[tuple[_Source, tuple[ImageRecord, Image.Image] | Unreadable]]:
    def work(source: _Source) -> tuple[ImageRecord, Image.Image] | Unreadable:
        try:
            return _make(source, folder, images, settings)
        except Unreadable as reason:
            return reason

    with ThreadPoolExecutor(_WORKERS) as pool, progress_bar(len(sources), "preparing images") as advance:
        for chunk in _chunks(sources, 8 * _WORKERS):  # results wait for no more than a chunk
            for source, result in zip(chunk, pool.map(work, chunk), strict=True):
                yield source, result
                advance(1)


def _chunks(sources: Sequence[_Source], size: int) -> Iterator[Sequence[_Source]]:
    return (sources[start : start + size] for start in range(0, len(sources), size))


def _make(source: _Source, folder: Path, images: Path, settings: PrepareSettings) -> tuple[ImageRecord, Image.Image]:
    """Write one image and its caption; its record, and the image for the sheet. Raises: Unreadable."""
    image = open_rgb(source.file)
    size = target_size(image.width, image.height, settings.side, settings.fit)
    cropped = crop_to(image, size)
    caption = settings.rule.caption(source.own)
    name = f"{source.index:05d}-{source.file.stem}.png"
    cropped.save(images / name, compress_level=4)
    (images / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    record = ImageRecord(
        source=source.file.relative_to(folder).as_posix(),
        name=name,
        width=image.width,
        height=image.height,
        size=size,
        own=source.own,
        caption=caption,
        sharpness=sharpness(image),
        grain=grain(image),
        code=perceptual_hash(image),
        texts=None if settings.find_text is None else settings.find_text(image),
        tokens=None if settings.count_tokens is None else settings.count_tokens(caption),
        faces=None if settings.find_faces is None else settings.find_faces(image),
    )
    cropped.thumbnail((TILE, TILE))
    return record, cropped


def _write(
    draft: Path,
    folder: Path,
    records: Sequence[ImageRecord],
    checks: Sequence[Check],
    pages: Sequence[str],
    settings: PrepareSettings,
) -> None:
    buckets = Counter(f"{width}x{height}" for width, height in (one.size for one in records))
    with (draft / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for one in records:
            row = {"file_name": f"images/{one.name}", "text": one.caption, "width": one.size[0], "height": one.size[1]}
            lines.write(json.dumps(row | {"source": one.source}, ensure_ascii=False) + "\n")
    content = {
        "kind": "lora_dataset",
        "format": 1,
        "metadata": "metadata.jsonl",
        "count": len(records),
        "resolution": settings.side,
        "fit": settings.fit,
        "name": settings.rule.name,
        "trigger": settings.rule.trigger,
        "buckets": dict(buckets.most_common()),
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (draft / "dataset.yaml").write_text(text, encoding="utf-8")
    page = render_page(
        _TEMPLATE,
        count=len(records),
        source=str(folder),
        buckets=", ".join(f"{size} ({count})" for size, count in buckets.most_common()),
        checks=checks,
        shown=_SHOWN,
        pages=pages,
    )
    (draft / "report.html").write_text(page, encoding="utf-8")
