"""Writes a transformer as a single file with the names of another program."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fewstep.atomic import write_tensors
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
        UserError: the family has no such layout, or the file cannot be written.
    """
    if layout not in family.key_layouts:
        known = ", ".join(family.key_layouts) or "none"
        raise UserError(f"{family.pipeline_class} has no single-file layout {layout!r}; known: {known}")
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in transformer.state_dict().items()}
    file = Path(file)
    write_tensors(file, family.key_layouts[layout].to_format(weights), {"format": "pt"})
    return file
