"""The names of tensors in single-file checkpoints, and their conversion from and to diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BLOCK = re.compile(r"(?:.*\.)?\w*blocks\.(\d+)\.")


@dataclass(frozen=True)
class KeyLayout:
    """How a format names a transformer's tensors.

    Attributes:
        renamed: parts of names, diffusers' -> the format's. A part that starts with a dot may be anywhere in a name,
            others only at its start.
        fused: a part of the format's names -> the parts of diffusers' names whose tensors it concatenates along the
            first dimension.
        unequal: whether these differ in size.
        swapped: starts of diffusers' names of tensors whose halves, scale and shift, have the format's other order;
            "{last}" is the number of the last block.
        prefix: of every name in files that are written.
        read_prefixes: prefixes that files of the format may have.
        ignored: names in some files that belong to no part of the model.
        other_components: prefixes of a checkpoint's other components.
        flat_endings: endings of names of tensors that some files store with other dimensions.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unequal: bool = False
    swapped: tuple[str, ...] = ()
    prefix: str = ""
    read_prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    other_components: tuple[str, ...] = ()
    flat_endings: tuple[str, ...] = ()

    def to_format(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by diffusers' names -> by the format's."""
        named: dict[str, Tensor] = {}
        swapped = self.swapped_starts(weights)
        for name, tensor in weights.items():
            fused = next((parts for parts in self.fused.values() if any(part in name for part in parts)), None)
            own = self.prefix + self.from_diffusers(name)[0]
            if fused is None:
                named[own] = (swap_halves(tensor) if name.startswith(swapped) else tensor).contiguous()
            elif fused[0] in name:
                named[own] = torch.cat([weights[name.replace(fused[0], part)] for part in fused])
        return named

    def swapped_starts(self, names: Iterable[str]) -> tuple[str, ...]:
        """``swapped`` for a model with these diffusers' names."""
        if not self.swapped:
            return ()
        last = max((int(found[1]) for name in names if (found := _BLOCK.match(name))), default=0)
        return tuple(start.format(last=last) for start in self.swapped)

    def without_prefix(self, keys: Iterable[str]) -> dict[str, str]:
        """A file's names -> the same without the prefix that all of the file's names have, if any."""
        keys = list(keys)
        prefix = next((p for p in self.read_prefixes if any(key.startswith(p) for key in keys)), "")
        return {key: key.removeprefix(prefix) for key in keys}

    def to_diffusers(self, name: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
        """A name of the format without its prefix -> diffusers' names, each with (index, count) of its part of a fused
        tensor, None if it is the whole tensor. Diffusers' names are unchanged."""
        for whole, parts in self.fused.items():
            if whole in name:
                for index, part in enumerate(parts):
                    yield self._renamed_back(name.replace(whole, part)), (index, len(parts))
                return
        starts = [ours for ours in self.renamed if not ours.startswith(".")]
        yield (name if name.startswith(tuple(starts)) else self._renamed_back(name)), None

    def from_diffusers(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """A diffusers' name -> the format's without its prefix, with (index, count) of its part of a fused tensor, None
        if it is the whole tensor."""
        for whole, parts in self.fused.items():
            for index, part in enumerate(parts):
                if part in name:
                    return _replace(name.replace(part, whole), self.renamed), (index, len(parts))
        return _replace(name, self.renamed), None

    def _renamed_back(self, name: str) -> str:
        return _replace(name, {theirs: ours for ours, theirs in self.renamed.items()})

    def diffusers_names(self, keys: Iterable[str]) -> set[str]:
        """The names of the format in a file -> diffusers'."""
        return {name for bare in self.without_prefix(keys).values() for name, _ in self.to_diffusers(bare)}


@dataclass(frozen=True)
class ProgramNames:
    """What ComfyUI and stable-diffusion.cpp call a family and the tensors of its components.

    Attributes:
        transformer, gguf_transformer: names in the family's ``key_layouts``, of safetensors and GGUF files.
        text_encoder, gguf_text_encoder: names of its tensors.
        gguf_architecture, gguf_text_architecture: ``general.architecture`` in GGUF files.
        clip_type: "type" of ComfyUI's node CLIPLoader.
    """

    transformer: str
    gguf_transformer: str
    text_encoder: KeyLayout
    gguf_text_encoder: KeyLayout
    gguf_architecture: str
    gguf_text_architecture: str
    clip_type: str


def swap_halves(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _replace(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name
