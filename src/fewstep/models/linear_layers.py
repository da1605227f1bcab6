"""Linear layers by the endings of their names, as LoRA targets and fp8 quantization name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from fewstep.errors import UserError


def matching_linears(transformer: nn.Module, endings: Sequence[str], key: str) -> dict[str, nn.Linear]:
    """The linear layers with one of the endings, by name; of a layer with LoRA adapters, its base layer.

    Args:
        endings: one or more whole parts of a name: "to_q", or "attention.to_out.0".
        key: what gave them, for the message.

    Raises:
        UserError: an ending without a layer, or none at all: a misspelled name would leave its layers out silently.
    """
    linears = {name: part for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    names = {name: "." + name.removesuffix(".base_layer") for name in linears if ".lora_" not in name}
    existing = ", ".join(_endings(names.values()))
    for ending in endings:
        if not any(name.endswith("." + ending) for name in names.values()):
            raise UserError(f"{key}: no linear layer is named {ending!r}; there are {existing}")
    if not endings:
        raise UserError(f"{key}: empty; there are {existing}")
    return {name: linears[name] for name, plain in names.items() if plain.endswith(tuple(f".{e}" for e in endings))}


def _endings(names: Iterable[str]) -> list[str]:
    """The shortest endings that tell what a layer is: its last part, with the one before where that is a number."""
    found = (re.search(r"[^.]+(\.\d+)*$", name) for name in names)
    return list(dict.fromkeys(match[0] for match in found if match))
