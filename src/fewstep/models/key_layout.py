"""The names of tensors in single-file checkpoints, and their conversion from and to diffusers' names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyLayout:
    """How a format names a transformer's tensors.

    Attributes:
        renamed: parts of names, diffusers' -> the format's. A part that starts with a dot may be anywhere in a name,
            others only at its start.
        fused: a part of the format's names -> the parts of diffusers' names whose tensors it concatenates, equally
            large, along the first dimension.
        prefix: of every name in files that are written.
        read_prefixes: prefixes that files of the format may have.
        ignored: names in some files that belong to no part of the model.
        other_components: prefixes of a checkpoint's other components.
        flat_endings: endings of names of tensors that some files store with other dimensions.
    """

    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prefix: str = ""
    read_prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    other_components: tuple[str, ...] = ()
    flat_endings: tuple[str, ...] = ()

    def to_format(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by diffusers' names -> by the format's."""
        named: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            fused = next(((whole, parts) for whole, parts in self.fused.items() if any(p in name for p in parts)), None)
            if fused is None:
                named[self.prefix + _replace(name, self.renamed)] = tensor.contiguous()
            elif fused[1][0] in name:
                whole, (first, *_) = fused
                tensors = [weights[name.replace(first, part)] for part in fused[1]]
                named[self.prefix + name.replace(first, whole)] = torch.cat(tensors)
        return named

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
                    yield name.replace(whole, part), (index, len(parts))
                return
        starts = [ours for ours in self.renamed if not ours.startswith(".")]
        if name.startswith(tuple(starts)):
            yield name, None
        else:
            yield _replace(name, {theirs: ours for ours, theirs in self.renamed.items()}), None

    def from_diffusers(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """A diffusers' name -> the format's without its prefix, with (index, count) of its part of a fused tensor, None
        if it is the whole tensor."""
        for whole, parts in self.fused.items():
            for index, part in enumerate(parts):
                if part in name:
                    return name.replace(part, whole), (index, len(parts))
        return _replace(name, self.renamed), None

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


def _replace(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name
