"""The one reader of prompts, from files, folders and datasets, one by one: a long list is never in memory as a whole.

The format follows from a file's extension; where that is none of the known ones, or .txt, from its content.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.data.prompt_fields import column_position, field_prompts, row_prompts
from fewstep.data.prompt_shards import PromptShards, is_encoded
from fewstep.data.prompt_tar import read_tar
from fewstep.data.prompt_text import clean_prompt
from fewstep.errors import UserError
from fewstep.machine import file_errors, reading, reason

if TYPE_CHECKING:
    from datasets import IterableDataset

HUB = "hf:"
FORMATS = (
    ".txt, .jsonl, .json, .csv, .tsv, .parquet and .tar files, folders of these, folders of encoded prompts, or "
    "hf:owner/name[:split]"
)
_DELIMITERS = ",;\t"
_SNIFFED = 2**16  # bytes of a file that decide about its format


def read_prompts(source: str | Path, column: str = "prompt") -> list[str]:
    """All prompts of a source, without the empty ones. Arguments and errors as for :func:`read_texts`.

    Raises:
        UserError: also where the source holds no prompt.
    """
    prompts = [text for text in read_texts(source, column) if text]
    if not prompts:
        raise UserError(f"{source}: no prompts in it; write one per line")
    return prompts


def read_texts(source: str | Path, column: str = "prompt") -> Iterator[str]:
    """The prompts of a source in their order, each cleaned (:func:`clean_prompt`); missing and invisible ones are "".

    Args:
        source: a text file with one prompt per line and comments after #; a .jsonl, .json, .csv, .tsv or .parquet file;
            a .tar file, a shard of a WebDataset; several files, as ``shards-{000..099}.tar``; a folder of such files,
            read in the order of their names; a folder of encoded prompts; or ``hf:owner/name[:split]``, a Hugging Face
            dataset, which is streamed.
        column: column or key of the prompts, in all but text files. A list of texts in it is as many prompts.

    Raises:
        UserError: no such file, format or column, or a line that cannot be read, with its number.
    """
    if str(source).startswith(HUB):
        return _hub(str(source), column)
    if is_encoded(source):
        return iter(PromptShards(source))
    try:
        readers = [(_reader(path), path) for path in prompt_files(source)]
    except OSError as error:
        raise UserError(f"{str(source)[:200]}: {error.strerror}") from None
    return chain.from_iterable(reader(path, column) for reader, path in readers)


def prompt_files(source: str | Path) -> list[Path]:
    """The files of a source: itself, those that its braces name, or those of a folder in the order of their names.

    Raises:
        UserError: a file or folder is not there, or the folder has no prompt files.
        OSError: it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    paths = [path] if path.exists() or "{" not in str(source) else expand_braces(str(source))
    for each in paths:
        if not each.exists():
            raise UserError(f"{each}: No such file or folder; prompts come from {FORMATS}")
    return paths


def expand_braces(pattern: str) -> list[Path]:
    """The files of a pattern such as ``shards-{000..099}.tar``.

    Raises:
        UserError: its braces do not match, or a package is missing.
    """
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise UserError(f"{pattern}: braces need webdataset; pip install 'fewstep[stream]'") from None
    try:
        return [Path(each) for each in braceexpand(pattern)]
    except ValueError:
        raise UserError(f"{pattern}: its braces do not match; 100 files are shards-{{000..099}}.tar") from None


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    """By extension, else by content."""
    reader = _READERS.get(path.suffix.lower())
    if reader is not None or not path.is_file():  # a pipe can be read once only
        return reader or _text
    with path.open("rb") as stream:
        start = stream.read(_SNIFFED)
    if start.startswith(b"PAR1"):
        return _parquet
    text = start.decode("utf-8", errors="replace").lstrip("\ufeff").lstrip()
    if path.suffix.lower() != ".txt" and ("\0" in text or "\ufffd" in text[:1000]):
        raise UserError(f"{path}: not a text file; prompts come from {FORMATS}")
    try:
        is_json = isinstance(json.loads(text.partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        is_json = False
    return _jsonl if is_json else _text


def _folder(path: Path) -> list[Path]:
    known = (*_READERS, ".txt")
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in known and not file.name.startswith(".")]
    if not files:
        raise UserError(
            f"{path}: no prompt files in it, and no encoded prompts; put some there, or run or resume fewstep "
            "encode-prompts"
        )
    return files


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and their numbers, without byte-order marks. Lines end at LF, CR LF or CR, at no other separator."""
    number = 0
    try:
        with reading(path), path.open("rb") as stream:
            for raw in stream:
                if number == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UserError(f"{path}: UTF-16, not a UTF-8 text file; save it as UTF-8")
                text = raw.decode("utf-8")
                if "\0" in text:
                    raise UserError(f"{path}, line {number + 1}: a NUL character; save the prompts as UTF-8 text")
                for line in text.rstrip("\r\n").replace("\ufeff", "").split("\r"):
                    number += 1
                    yield number, line
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number + 1}: not a UTF-8 text file; save it as UTF-8") from None


def _text(path: Path, column: str) -> Iterator[str]:
    for _, line in _lines(path):
        text = clean_prompt(line)
        if not text.startswith("#"):
            yield text.removeprefix("\\") if text.startswith("\\#") else text


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        yield from row_prompts(row, column, where)


def _json(path: Path, column: str) -> Iterator[str]:
    """One array of texts or objects, or one object; a file of several objects is read as JSON Lines."""
    try:
        tree = json.loads("\n".join(line for _, line in _lines(path)))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from _jsonl(path, column)
            return
        raise UserError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(tree if isinstance(tree, list) else [tree], start=1):
        yield from row_prompts(row, column, f"{path}, entry {number}")


def _csv(path: Path, column: str) -> Iterator[str]:
    lines = _lines(path)
    last, header = next((each for each in lines if each[1].strip()), (0, ""))
    delimiter = next((each for each in _DELIMITERS if column in _fields(header, each)), _DELIMITERS[0])
    names = _fields(header, delimiter)
    index = column_position(names, column, str(path))

    def numbered() -> Iterator[str]:
        nonlocal last
        for last, line in lines:  # noqa: B007  # read outside
            yield line + "\n"

    rows = csv.reader(numbered(), delimiter=delimiter, strict=True)
    while True:
        first = last + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {first}: {error}; close each quote, and double those in a prompt") from None
        if row is None:
            return
        if row and len(row) != len(names):
            raise UserError(
                f"{path}, line {last}: {len(row)} fields, but the header has {len(names)}; put prompts with "
                f"{delimiter!r} in quotes"
            )
        if row:
            yield clean_prompt(row[index])


def _fields(header: str, delimiter: str) -> list[str]:
    try:
        return [clean_prompt(name) for name in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow; pip install 'fewstep[prompts]'") from None
    number = 0
    with reading(path, "not a parquet file, or a damaged one"):
        file = parquet.ParquetFile(path)
    column_position(file.schema_arrow.names, column, str(path))
    with file, reading(path, "its first rows may be readable, the file is damaged"):
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                raise UserError(f"{path}, after row {number}: text that is not UTF-8") from None
            for number, value in enumerate(values, start=number + 1):  # noqa: B020  # counts across batches
                yield from field_prompts(value, column, f"{path}, row {number}")


def _hub(source: str, column: str) -> Iterator[str]:
    with hub_errors(source):
        for number, row in enumerate(open_hub(source)):
            yield from row_prompts(row, column, f"{source}, row {number}")


def open_hub(source: str) -> IterableDataset:
    """A Hugging Face dataset, whose rows are read when they are iterated over; :func:`hub_errors` has the errors.

    Args:
        source: ``hf:owner/name[:split]``; the split is "train" by default.

    Raises:
        UserError: the package is missing.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source}: Hugging Face datasets need datasets; pip install 'fewstep[prompts]'") from None
    name, _, split = source.removeprefix(HUB).partition(":")
    return load_dataset(name, split=split or "train", streaming=True)


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Inside, a dataset is opened or read. Raises: UserError where that fails; the connection may break on the way."""
    failures: tuple[type[Exception], ...] = (*file_errors(), ValueError, RuntimeError)
    try:
        yield
    except failures as error:
        raise UserError(f"{source}: {reason(error)}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".tar": read_tar,
}
