"""Writes a transformer as a single file with the names of another program."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from fewstep.errors import UserError
from fewstep.models.family import ModelFamily


def write_transformer(
    transformer: nn.Module, file: str | Path, family: ModelFamily, layout: str, dtype: torch.dtype | None = None
) -> Path:
    """Write a transformer's weights as one safetensors file, which appears complete or not at all.

    Args:
        layout: a name in the family's ``key_layouts``: "original" or "comfyui" for Z-Image.
        dtype: of the written weights; unset, the model's.

    Raises:
        UserError: the family has no such layout.
    """
    if layout not in family.key_layouts:
        known = ", ".join(family.key_layouts) or "none"
        raise UserError(f"{family.pipeline_class} has no single-file layout {layout!r}; known: {known}")
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in transformer.state_dict().items()}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(family.key_layouts[layout].to_format(weights), partial, {"format": "pt"})
    partial.replace(file)
    return file
