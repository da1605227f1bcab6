"""What a path seems to be that was given as a model and is none."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fewstep.models.file_kinds import CONVERTIBLE, describe_weights

_ADAPTERS = ("adapter_config.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_SINGLE_FILES = (".safetensors", ".sft", ".gguf")


def describe_path(path: Path, index: str) -> str | None:
    """What a path that is no model's folder seems to be, and what to do; None if that cannot be said.

    Args:
        index: name of the file that makes a folder a model.
    """
    if path.is_dir():
        return _describe_folder(path, index)
    if path.suffix.lower() in (".yaml", ".yml"):
        return "a recipe, not a model; fewstep distill makes a model of it"
    known = describe_weights(path) if path.is_file() else None
    if path.suffix.lower() not in _SINGLE_FILES or (known is not None and known not in CONVERTIBLE):
        return known
    command = f"fewstep convert {shlex.quote(str(path))} --components-from MODEL --out FOLDER"
    return f"a single file; convert it to a folder first: {command}"


def _describe_folder(folder: Path, index: str) -> str | None:
    inside = next((name for name in ("student", "model") if (folder / name / index).is_file()), None)
    if inside is not None:
        return f"the folder of a run; its model is {folder / inside}"
    if any((folder / name).is_file() for name in _ADAPTERS):
        beside = folder.parent / "student"
        merged = f"; the merged student is {beside}" if (beside / index).is_file() else ""
        return f"a LoRA adapter, which is no whole model{merged or '; give it with --lora beside its base model'}"
    if (folder.parent / index).is_file():
        return f"one component of a model; the model is {folder.parent}"
    config = _config(folder / "config.json")
    if "_class_name" in config or "architectures" in config:
        kind = config.get("_class_name") or config["architectures"]
        return f"one component ({' '.join(kind) if isinstance(kind, list) else kind}), no whole model"
    if (folder / "recipe.yaml").is_file():
        return "the folder of a run that is not finished: it has no student yet"
    nested = sorted(path.parent.name for path in folder.glob(f"*/{index}"))
    if nested:
        return f"a folder of models; name one of them: {', '.join(nested[:5])}"
    files = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in _SINGLE_FILES)
    if files:
        return describe_path(files[0], index) if len(files) == 1 else f"a folder of {len(files)} single files"
    return None


def _config(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
