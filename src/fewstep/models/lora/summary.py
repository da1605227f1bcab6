"""What is in an adapter: ranks, targets, size of its updates by block."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from fewstep.models.lora.metadata import trained_on
from fewstep.models.lora.weights import Kronecker, Lora, LowRank, Update

_BLOCK = re.compile(r"(?P<block>[^.]+\.\d+)\.(?P<rest>.+)")

#: Keys of headers that are long and tell nothing about the adapter.
_LONG = (
    "ss_tag_frequency",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "modelspec.thumbnail",
    "training_info",
    "lora_adapter",
)


def kinds(lora: Lora) -> list[str]:
    """ "LoRA", "LoKr", "LoRA with DoRA", ...: each once."""
    return list(dict.fromkeys(_kind(update) for update in lora.updates.values()))


def scales(lora: Lora) -> list[float]:
    """The different scales (alpha over rank), ascending."""
    changes = [update.change for update in lora.updates.values()]
    return sorted({change.scale for change in changes if isinstance(change, LowRank | Kronecker)})


def targets(lora: Lora) -> dict[str, int]:
    """How many layers of each kind are adapted: {"attention.to_q": 30, ...}."""
    return dict(Counter(block_and_rest(name)[1] for name in lora.updates))


def block_norms(lora: Lora) -> dict[str, float]:
    """The Frobenius norm of all updates of each block, in the order of the file's blocks; DoRA's magnitudes are not
    counted."""
    squares: dict[str, float] = {}
    for name, update in lora.updates.items():
        block, _ = block_and_rest(name)
        squares[block] = squares.get(block, 0.0) + update.change.norm() ** 2
    return {block: squares[block] ** 0.5 for block in sorted(squares, key=_natural)}


def header(lora: Lora) -> Iterator[tuple[str, str]]:
    """What it was trained on, and the entries of the file's header, without pictures and lists."""
    known = {"base": "a multi-step model", "student": "a few-step model", None: "not in the metadata"}
    yield "trained on", known[trained_on(lora.metadata)]
    for key, value in sorted(lora.metadata.items()):
        if key != "format" and value and not key.startswith(_LONG):
            text = " ".join(value.split())
            yield key, text if len(text) <= 200 else f"{text[:197]}..."


def block_and_rest(name: str) -> tuple[str, str]:
    """A layer's name -> its block, such as "layers.9", and the name in it; "other" for layers outside of blocks."""
    found = _BLOCK.match(name)
    return (found["block"], found["rest"]) if found else ("other", name)


def _kind(update: Update) -> str:
    kind = "LoRA" if isinstance(update.change, LowRank) else "LoKr"
    return kind if update.magnitude is None else f"{kind} with DoRA"


def _natural(block: str) -> tuple[str, int]:
    name, _, number = block.rpartition(".")
    return (name, int(number)) if number.isdigit() else (block, -1)
