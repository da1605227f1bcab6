"""Loading a model's components from a folder in diffusers' layout: no weight keeps its random initialization, nothing
is unpickled, and memory use does not exceed the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from fewstep.errors import UserError
from fewstep.models.family import MODEL_INDEX, LoadingInfo, ModelFamily, resolve_family

BUNDLED_MODELS = {"micro": Path(__file__).parent.parent / "assets" / "micro"}

NO_FP16 = "fp16: activations of this model family overflow in it; take bf16"

_HUB_ID = re.compile(r"(hf:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADED = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.jinja"]

#: Weights of released text encoders that hidden states do not depend on.
_UNUSED = ("lm_head.",)


def resolve_model(path_or_name: str | Path) -> Path:
    """The folder of a model: a path, the name of a bundled one, or a Hugging Face hub id, downloaded unless cached.

    Raises:
        UserError: there is no such model.
    """
    name = str(path_or_name)
    folder = BUNDLED_MODELS.get(name, Path(path_or_name))
    if (folder / MODEL_INDEX).is_file():
        return folder
    if folder.suffix in (".safetensors", ".gguf"):
        raise UserError(
            f"{folder}: a single file; convert it to a folder first: "
            f"fewstep convert {folder} --components-from MODEL --out FOLDER"
        )
    if _HUB_ID.fullmatch(name) and not (folder.parent.exists() or folder.exists()):
        return _download(name.removeprefix("hf:"))
    names = ", ".join(BUNDLED_MODELS)
    raise UserError(f"{folder}: no model found ({MODEL_INDEX} is missing); give a folder, a hub id, or one of: {names}")


def component_folder(path_or_name: str) -> Path:
    """The folder with components: a bundled model's by its name, else the path."""
    return BUNDLED_MODELS.get(path_or_name, Path(path_or_name))


def _download(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=_DOWNLOADED))
    except LocalEntryNotFoundError:
        reason = "it is not in the cache, and the hub cannot be reached"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{repository}: no such folder, and the download from the Hugging Face hub failed: {reason}")


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A component's ``config.json``. Raises: UserError."""
    file = folder / name / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    return config


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype to load a component in by default: bf16 if its weights are stored in bf16, else fp32."""
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            stored = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        return torch.bfloat16 if stored == {"BF16"} else torch.float32
    return torch.float32


def load_component(folder: Path, name: str, dtype: torch.dtype | None = None, family: ModelFamily | None = None) -> Any:
    """Load one component of a model; modules are frozen and in eval mode.

    Args:
        dtype: of the weights; unset, the stored one.
        family: unset, the one that the folder's ``model_index.json`` names.

    Raises:
        UserError: it cannot be read, or weights are missing, unexpected or of other shapes; names them and the file.
    """
    family = family or resolve_family(folder)
    if dtype == torch.float16 and not family.fp16:
        raise UserError(NO_FP16)
    path = folder / name
    try:
        with silence_loggers():
            if name in family.others:
                return family.load_other(name, path)
            module, info = family.load_module(name, path, dtype or stored_dtype(path))
    except Exception as error:  # libraries raise many types for a bad file; the message must name it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be loaded: {reason.partition(' If you want')[0]}") from error
    _check_loading_info(path, info)
    return module.eval().requires_grad_(False)


def _check_loading_info(path: Path, info: LoadingInfo) -> None:
    """Raises: UserError if weights kept their initialization, or tensors were not used."""
    mismatched = {key: (tuple(found), tuple(expected)) for key, found, expected in info["mismatched_keys"]}
    if mismatched:
        key, (found, expected) = next(iter(mismatched.items()))
        raise UserError(f"{_file_of(path, key)}: {key} is {found}, expected {expected}{_more(len(mismatched) - 1)}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{path}: {format_tensor_names('missing', missing)}")
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(_UNUSED))
    if unexpected:
        raise UserError(f"{_file_of(path, unexpected[0])}: {format_tensor_names('unexpected', unexpected)}")


def format_tensor_names(problem: str, names: Sequence[str]) -> str:
    """ "missing tensors: a, b": the first few of them by name."""
    if len(names) == 1:
        return f"one {problem} tensor: {names[0]}"
    return f"{len(names)} {problem} tensors: {', '.join(names[:3])}{_more(len(names) - 3)}"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _file_of(path: Path, key: str) -> Path:
    """The file that holds a tensor; the loader may have removed a prefix from its name."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                if any(name == key or name.endswith(f".{key}") for name in set(tensors.keys())):
                    return file
        except SafetensorError:
            continue
    return path


@contextmanager
def silence_loggers() -> Iterator[None]:
    """Inside, diffusers and transformers show no progress bars and log only errors; fewstep reports problems itself."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.enable_progress_bar()
            library.set_verbosity(level)
