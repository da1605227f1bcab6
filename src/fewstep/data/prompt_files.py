"""The one reader of prompts, from files, folders and datasets, one by one: a long list is never in memory as a whole.

The format follows from a file's extension; where that is none of the known ones, or .txt, from its content.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fewstep.data.prompt_shards import PromptShards, is_encoded
from fewstep.data.prompt_text import clean_prompt
from fewstep.errors import UserError
from fewstep.machine import file_errors, reading, reason

HUB = "hf:"
FORMATS = (
    ".txt, .jsonl, .json, .csv, .tsv and .parquet files, folders of these, folders of encoded prompts, or "
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
            a folder of such files, read in the order of their names; a folder of encoded prompts; or
            ``hf:owner/name[:split]``, a Hugging Face dataset, which is streamed.
        column: column or key of the prompts, in all but text files. A list of texts in it is as many prompts.

    Raises:
        UserError: no such file, format or column, or a line that cannot be read, with its number.
    """
    if str(source).startswith(HUB):
        return _hub(str(source), column)
    path = Path(source)
    try:
        if path.is_dir():
            return _folder(path, column)
        if not path.exists():
            raise UserError(f"{source}: No such file or folder; prompts come from {FORMATS}")
        return _reader(path)(path, column)
    except OSError as error:
        raise UserError(f"{str(source)[:200]}: {error.strerror}") from None


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


def _folder(path: Path, column: str) -> Iterator[str]:
    if is_encoded(path):
        return iter(PromptShards(path))
    known = (*_READERS, ".txt")
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in known and not file.name.startswith(".")]
    if not files:
        raise UserError(
            f"{path}: no prompt files in it, and no encoded prompts; put some there, or run or resume fewstep "
            "encode-prompts"
        )
    return chain.from_iterable(_reader(file)(file, column) for file in files)


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
        yield from _row(row, column, where)


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
        yield from _row(row, column, f"{path}, entry {number}")


def _csv(path: Path, column: str) -> Iterator[str]:
    lines = _lines(path)
    last, header = next((each for each in lines if each[1].strip()), (0, ""))
    delimiter = next((each for each in _DELIMITERS if column in _fields(header, each)), _DELIMITERS[0])
    names = _fields(header, delimiter)
    index = _position(names, column, str(path))

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
    _position(file.schema_arrow.names, column, str(path))
    with file, reading(path, "its first rows may be readable, the file is damaged"):
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                raise UserError(f"{path}, after row {number}: text that is not UTF-8") from None
            for number, value in enumerate(values, start=number + 1):  # noqa: B020  # counts across batches
                yield from _texts(value, column, f"{path}, row {number}")


def _hub(source: str, column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source}: Hugging Face datasets need datasets; pip install 'fewstep[prompts]'") from None
    failures: tuple[type[Exception], ...] = (*file_errors(), ValueError, RuntimeError)
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True)):
            yield from _row(row, column, f"{source}, row {number}")
    except failures as error:  # the connection may also break on the way
        raise UserError(f"{source}: {reason(error)}") from None


def _row(row: Any, column: str, where: str) -> list[str]:
    """The prompts of an object, or of a text that stands for itself."""
    if not isinstance(row, dict):
        return _texts(row, "the row", where)
    _position(list(row), column, where)
    return _texts(row[column], column, where)


def _texts(value: Any, column: str, where: str) -> list[str]:
    """The prompts in a field: a text, a list of texts, or nothing."""
    values = value if isinstance(value, list) else [value]
    for each in values:
        if not isinstance(each, str | None):
            raise UserError(f"{where}: {column} holds {_KINDS.get(type(each), 'a value')}, where a text is expected")
    return [clean_prompt(each or "") for each in values] or [""]


def _position(names: Sequence[str], column: str, where: str) -> int:
    """The one place of a column among the names. Raises: UserError if there is none, or another of this name."""
    if names.count(column) != 1:
        problem = "two columns" if column in names else "no"
        listed = ", ".join(map(str, names))[:200] or "none"
        raise UserError(
            f"{where}: {problem} {column!r}; there are {listed}; set --column, or prompts.column in a recipe"
        )
    return names.index(column)


_KINDS = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", bytes: "bytes"}

_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
