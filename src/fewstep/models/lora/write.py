"""Writing LoRA files with the names of other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.atomic import atomic_folder, write_tensors
from fewstep.errors import UserError
from fewstep.models.lora.config import PEFT_CONFIG, PEFT_WEIGHTS
from fewstep.models.lora.formats import FORMATS, LoraFormat
from fewstep.models.lora.fuse import fuse
from fewstep.models.lora.metadata import BASE_MODEL
from fewstep.models.lora.targets import LoraTargets
from fewstep.models.lora.weights import Kronecker, LowRank, Rows, Update


def write_lora(
    path: Path,
    updates: Mapping[str, Update],
    targets: LoraTargets,
    layout: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter as a file, or as a folder in the layout "peft"; it appears complete or not at all.

    Args:
        updates: by diffusers' names.
        layout: a name in ``formats.FORMATS``.
        dtype: of the written weights.

    Raises:
        UserError: the layout has no form for an update, or the file cannot be written.
    """
    chosen = FORMATS[layout]
    named = fuse(updates, targets) if chosen.fused else dict(updates)
    tensors = to_tensors(named, layout, dtype)
    if not chosen.peft_folder:
        write_tensors(path, tensors, metadata)
        return
    config = _peft_config(named, metadata.get(BASE_MODEL, ""))
    with atomic_folder(path) as aside:
        save_file(tensors, aside / PEFT_WEIGHTS, dict(metadata))
        (aside / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def to_tensors(named: Mapping[str, Update], layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file, from updates by the names of its modules. Errors as for :func:`write_lora`."""
    chosen = FORMATS[layout]
    found: dict[str, Tensor] = {}
    for module, update in named.items():
        ends = _endings(module, update, layout, chosen)
        found |= {chosen.key(module, ending): tensor.to(dtype).contiguous() for ending, tensor in ends.items()}
    return found


def _endings(module: str, update: Update, layout: str, chosen: LoraFormat) -> dict[str, Tensor]:
    """A module's tensors by the ends of their keys."""
    change = update.change
    if isinstance(change, Rows):
        raise UserError(
            f"{module}: LoKr of a fused layer has no exact form with the names of {layout}; write comfyui, or turn it "
            "into LoRA: fewstep lora resize"
        )
    if isinstance(change, LowRank):
        up = change.up if chosen.alpha else change.scale * change.up
        ends = {chosen.down: change.down, chosen.up: up}
        if chosen.alpha:
            ends["alpha"] = torch.tensor(change.scale * change.rank)
    else:
        ends = _kronecker(module, change, chosen)
    if update.magnitude is not None:
        ends[chosen.magnitude] = _magnitude(module, update, layout, chosen)
    return ends


def _kronecker(module: str, change: Kronecker, chosen: LoraFormat) -> dict[str, Tensor]:
    if chosen.peft_folder:
        raise UserError(f"{module}: LoKr is not written as a peft folder; write diffusers")
    ends: dict[str, Tensor] = {}
    scaled = (change.scale * change.left[0], *change.left[1:])
    for name, factors in (("lokr_w1", scaled), ("lokr_w2", change.right)):
        names = [name] if len(factors) == 1 else [f"{name}_a", f"{name}_b"]
        ends |= dict(zip(names, factors, strict=True))
    if chosen.alpha and change.rank is not None:
        ends["alpha"] = torch.tensor(float(change.rank))  # alpha / rank is 1: the scale is in the factor
    return ends


def _magnitude(module: str, update: Update, layout: str, chosen: LoraFormat) -> Tensor:
    assert update.magnitude is not None
    if chosen.magnitude == "dora_scale":
        return update.magnitude
    if update.magnitude.shape[1] != 1 or not isinstance(update.change, LowRank):
        raise UserError(
            f"{module}: peft and {layout} have DoRA of LoRA with norms of rows alone; write kohya or comfyui"
        )
    return update.magnitude.flatten()


def _peft_config(named: Mapping[str, Update], base: str) -> dict[str, Any]:
    """peft's configuration; the scales are in the weights, so that every alpha is the rank."""
    ranks = {name: update.change.rank or 0 for name, update in named.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(named),
        "use_dora": any(update.magnitude is not None for update in named.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
