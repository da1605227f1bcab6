"""Prompts from files and datasets, one by one: a long list is never in memory as a whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.machine import file_errors, reading, reason

HUB = "hf:"


def read_texts(source: str, column: str = "prompt") -> Iterator[str]:
    """The prompts of a source in their order; a value that is not text, such as a missing one, becomes "".

    Args:
        source: a .txt file with one per line, a .jsonl, .csv or .parquet file, or ``hf:owner/name[:split]``, a Hugging
            Face dataset, which is streamed.
        column: column or key of the prompts, in all but text files.

    Raises:
        UserError: no such file, format or column, or a line that cannot be read, with its number.
    """
    if source.startswith(HUB):
        return _hub(source, column)
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{source}: prompts come from {', '.join(_READERS)} files, or from hf:owner/name[:split]")
    if not path.is_file():
        raise UserError(f"{source}: no such file")
    return reader(path, column)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with reading(path), path.open(encoding="utf-8-sig", newline="") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None


def _text(path: Path, column: str) -> Iterator[str]:
    for _, line in _lines(path):
        yield line


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if isinstance(row, dict) and column not in row:
            raise UserError(f"{path}, line {number}: no {column!r}; there are {_listed(row)}; set --column")
        yield _as_text(row[column] if isinstance(row, dict) else row)


def _csv(path: Path, column: str) -> Iterator[str]:
    rows = csv.DictReader(line + "\n" for _, line in _lines(path))
    if column not in (rows.fieldnames or ()):
        raise UserError(f"{path}: no column {column!r}; there are {_listed(rows.fieldnames or ())}; set --column")
    try:
        for row in rows:
            yield _as_text(row[column])
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow; pip install 'fewstep[prompts]'") from None
    with reading(path, "not a parquet file, or a damaged one"):
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
    if column not in names:
        raise UserError(f"{path}: no column {column!r}; there are {_listed(names)}; set --column")
    with reading(path, "its first rows may be readable, the file is damaged"):
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from map(_as_text, batch.column(0).to_pylist())


def _hub(source: str, column: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source}: Hugging Face datasets need datasets; pip install 'fewstep[prompts]'") from None
    failures: tuple[type[Exception], ...] = (*file_errors(), ValueError, RuntimeError)
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True)):
            if column not in row:
                raise UserError(f"{source}, row {number}: no {column!r}; there are {_listed(row)}; set --column")
            yield _as_text(row[column])
    except failures as error:  # the connection may also break on the way
        raise UserError(f"{source}: {reason(error)}") from None


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
