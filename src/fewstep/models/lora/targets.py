"""The layers of a transformer that adapters bind to, by all the names that files have for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from fewstep.models.components import read_config
from fewstep.models.family import ModelFamily, resolve_any_family
from fewstep.models.key_layout import KeyLayout
from fewstep.models.lora.parts import PREFIXES, flatten

#: The layers that a module of a file is: diffusers names, in the order of a fused layer's rows.
Layers = list[str]


@dataclass(frozen=True)
class LoraTargets:
    """The linear layers of a transformer.

    Attributes:
        shapes: (out, in) by diffusers' name; None where only the names are known.
        layout: names in the family's single files; None if it has none.
    """

    shapes: Mapping[str, tuple[int, int] | None]
    layout: KeyLayout | None = field(repr=False)

    @cached_property
    def _by_flat_name(self) -> dict[str, Layers]:
        found: dict[str, Layers] = {flatten(name): [name] for name in self.shapes}
        fused: dict[str, dict[int, str]] = {}
        for name in self.shapes:
            other, part = self.file_name(name)
            fused.setdefault(flatten(other), {})[0 if part is None else part[0]] = name
        for other, parts in fused.items():
            found.setdefault(other, [parts[index] for index in sorted(parts)])
        return found

    @cached_property
    def _swapped(self) -> tuple[str, ...]:
        """Starts of the names of layers whose rows have another order in the family's single files: an adapter's would
        be misread."""
        return () if self.layout is None else self.layout.swapped_starts(self.shapes)

    def file_name(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """A layer's name in the family's single files, and (index, count) of its part of a fused layer."""
        if self.layout is None or f"{name}.".startswith(self._swapped):
            return name, None
        other, part = self.layout.from_diffusers(f"{name}.weight")
        return other.removesuffix(".weight"), part

    def resolve(self, module: str) -> Layers | None:
        """The layers that a file's module is, whatever its prefixes; None if it is none."""
        return next((self._by_flat_name[flat] for flat in _unprefixed(module) if flat in self._by_flat_name), None)


def _unprefixed(module: str) -> Iterator[str]:
    """The flat name of a module with fewer and fewer of its prefixes."""
    yield flatten(module)
    prefix = next((prefix for prefix in PREFIXES if module.startswith(prefix)), None)
    if prefix is not None:
        yield from _unprefixed(module.removeprefix(prefix))


def targets_of(transformer: nn.Module, family: ModelFamily) -> LoraTargets:
    """The linear layers of a transformer; of a layer with a peft adapter, its base layer."""
    found = {name: part for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    shapes = {
        name.removesuffix(".base_layer"): (part.out_features, part.in_features)
        for name, part in found.items()
        if ".lora_" not in name
    }
    return LoraTargets(shapes, next(iter(family.key_layouts.values()), None))  # of one family, prefixes alone differ


def model_targets(folder: Path) -> LoraTargets:
    """The linear layers of a model's transformer, from its configuration alone. Raises: UserError."""
    family = resolve_any_family(folder)
    with torch.device("meta"):
        return targets_of(family.build("transformer", read_config(folder, "transformer")), family)


def released_targets(family: ModelFamily) -> LoraTargets:
    """The names of the layers of a family's released model, whose configuration is its class's default; without those
    of fused layers where the sizes of their parts would have to be known."""
    with torch.device("meta"):
        known = targets_of(family.build("transformer", {}), family)
    layout = None if known.layout is None or known.layout.unequal else known.layout
    return LoraTargets(dict.fromkeys(known.shapes), layout)
