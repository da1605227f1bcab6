"""Prompts in WebDataset shards. Images and other members are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.prompt_fields import field_prompts, row_prompts
from fewstep.data.tar_samples import TarSample, read_samples
from fewstep.errors import UserError

TEXTS = ("txt", "json")


def read_tar(path: Path, column: str) -> Iterator[str]:
    """The prompts of each sample that has text; see :func:`sample_prompts`.

    Raises:
        UserError: the file is damaged or holds pickles, or a sample has no such prompt.
    """
    for sample in read_samples(path, TEXTS):
        yield from sample_prompts(sample, column)


def sample_prompts(sample: TarSample, column: str) -> list[str]:
    """The prompts of a sample: ``column`` of its ``.json`` member where that has it, else its ``.txt`` member. A list
    of texts is as many prompts; an invisible one is "".

    Raises:
        UserError: it has none, or it cannot be read.
    """
    members, where = sample.members, sample.where
    try:
        row = json.loads(members["json"]) if "json" in members else {}
        text = members["txt"].decode() if "txt" in members else None
    except UnicodeDecodeError:
        raise UserError(f"{where}: text that is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if text is not None and not (isinstance(row, dict) and column in row):
        return field_prompts(text, "txt", where)
    return row_prompts(row, column, where)
