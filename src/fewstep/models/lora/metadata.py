"""The header of LoRA files: ModelSpec's keys (github.com/Stability-AI/ModelSpec, version 1.0.0), and fewstep's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

TrainedOn = Literal["base", "student"]

#: fewstep's own key: whether the adapter was trained on a multi-step or a few-step model.
TRAINED_ON = "fewstep.trained_on"
BASE_MODEL = "fewstep.base_model"

#: Keys in which programs name the model that an adapter was trained on.
_MODEL_NAMES = (BASE_MODEL, "ss_sd_model_name", "ss_base_model_name", "base_model_name_or_path", "base_model")
_FEW_STEP = re.compile(r"turbo|distill|few[-_ ]?step|lightning|student", re.IGNORECASE)
_BASE = re.compile(r"z[-_ ]?image([-_ ]?base)?([-_](bf16|fp16|fp32|fp8\w*))?(\.safetensors)?$", re.IGNORECASE)


def lora_metadata(
    title: str,
    *,
    architecture: str = "z-image",
    base_model: str = "",
    kind: TrainedOn | None = None,
    description: str = "",
    trigger: str = "",
    merged_from: str = "",
    resolution: int | None = None,
    date: datetime | None = None,
) -> dict[str, str]:
    """The header of a new LoRA file. Empty values are left out.

    Args:
        architecture: ModelSpec's ID of the model; "-lora" is appended, as in the specification's examples.
        base_model: the model that it was trained on.
        kind: whether that is a multi-step or a few-step model.
        trigger: the word that a prompt needs.
        merged_from: titles of the files it was made of.
        resolution: pixels of a side in training.
        date: of its making; now, unless given.
    """
    made = (date or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    found = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}-lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.description": description,
        "modelspec.date": made,
        "modelspec.trigger_phrase": trigger,
        "modelspec.merged_from": merged_from,
        "modelspec.resolution": "" if resolution is None else f"{resolution}x{resolution}",
        BASE_MODEL: base_model,
        TRAINED_ON: kind or "",
    }
    return {key: value for key, value in found.items() if value}


def trained_on(metadata: Mapping[str, str]) -> TrainedOn | None:
    """Whether an adapter was trained on a multi-step or a few-step model: as fewstep wrote it, or by the model's name;
    None if neither tells."""
    own: dict[str, TrainedOn] = {"base": "base", "student": "student"}
    if (known := own.get(metadata.get(TRAINED_ON, ""))) is not None:
        return known
    names = [metadata[key] for key in _MODEL_NAMES if metadata.get(key)]
    architecture = metadata.get("modelspec.architecture", "")
    if any(_FEW_STEP.search(name) for name in (*names, architecture)):
        return "student"
    if any(_BASE.search(name.rstrip("/")) for name in names):
        return "base"
    return None


#: Keys that describe the tensors of the file they were in, not of one that is made of it.
_OF_THE_TENSORS = ("lora_adapter_metadata", "ss_network_dim", "ss_network_alpha", "modelspec.hash_sha256", "sshs_")


def derived_metadata(metadata: Mapping[str, str], title: str) -> dict[str, str]:
    """The header of a file that is made of another: its entries, but those about its tensors; with ModelSpec's
    required ones where it has none."""
    kept = {key: value for key, value in metadata.items() if value and not key.startswith(_OF_THE_TENSORS)}
    return lora_metadata(title) | kept | {"format": "pt"}
