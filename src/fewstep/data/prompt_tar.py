"""Prompts in WebDataset shards: tar files whose members with one key, such as ``00012.jpg`` and ``00012.txt``, are one
sample. Images and other members are passed over, and nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewstep.data.prompt_fields import field_prompts, row_prompts
from fewstep.errors import UserError
from fewstep.machine import reading

_TEXTS = {"txt", "json"}
_PICKLES = (".pyd", ".pickle", ".pkl", ".pth", ".pt")


def read_tar(path: Path, column: str) -> Iterator[str]:
    """The prompt of each sample: ``column`` of its ``.json`` member where that has it, else its ``.txt`` member.

    Raises:
        UserError: the file is damaged or holds pickles, or a sample has no such prompt.
    """
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise UserError(f"{path}: WebDataset shards need webdataset; pip install 'fewstep[stream]'") from None
    with reading(path, "not a tar file, or a damaged one"):
        try:
            for sample in group_by_keys(_members(path)):
                yield from _sample_prompts(sample, column, f"{path}, sample {sample['__key__']}")
        except ValueError:
            raise UserError(f"{path}: two members of one sample have the same name; write the shard again") from None


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """The text members, read one after the other."""
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    def is_read(name: str) -> bool:
        return _is_pickle(name) or str(base_plus_ext(name)[1]).lower() in _TEXTS

    with path.open("rb") as stream:
        for member in tar_file_iterator(stream, select_files=is_read):
            if _is_pickle(member["fname"]):
                raise UserError(f"{path}: {member['fname']} is a pickle, which can run any program; leave it out")
            yield {**member, "__url__": str(path)}


def _is_pickle(name: str) -> bool:
    return name.lower().endswith(_PICKLES)


def _sample_prompts(sample: Mapping[str, Any], column: str, where: str) -> list[str]:
    try:
        row = json.loads(sample["json"]) if "json" in sample else {}
        text = sample["txt"].decode() if "txt" in sample else None
    except UnicodeDecodeError:
        raise UserError(f"{where}: text that is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if text is not None and not (isinstance(row, dict) and column in row):
        return field_prompts(text, "txt", where)
    return row_prompts(row, column, where)
