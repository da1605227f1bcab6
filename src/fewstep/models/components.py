"""Loading a model's components from a folder in diffusers' layout: no weight keeps its random initialization, nothing
is unpickled, and memory use does not exceed the weights."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from fewstep.errors import UserError
from fewstep.models.family import MODEL_INDEX, LoadingInfo, ModelFamily, resolve_family
from fewstep.models.file_kinds import describe_file, describe_tensors
from fewstep.models.folder_kinds import describe_path
from fewstep.models.key_layout import KeyLayout
from fewstep.models.library_logs import silence_loggers
from fewstep.models.weight_files import file_of_tensor, stored_dtype, tensor_names

_ASSETS = Path(__file__).parent.parent / "assets"
BUNDLED_MODELS = {name: _ASSETS / name for name in ("micro", "micro-turbo")}

NO_FP16 = "fp16: activations of this model family overflow in it; take bf16"

HUB_ID = re.compile(r"(hf:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What the libraries read; a repository may hold variants and single files besides, of tens of gigabytes.
_DOWNLOADED = [
    *("*.json", "*/*.json", "*/*.txt", "*/*.jinja"),
    *("*/model.safetensors", "*/model-?????-of-?????.safetensors"),
    *("*/diffusion_pytorch_model.safetensors", "*/diffusion_pytorch_model-?????-of-?????.safetensors"),
]

#: Weights of released text encoders that hidden states do not depend on.
_UNUSED = ("lm_head.",)


def resolve_model(path_or_name: str | Path) -> Path:
    """The folder of a model: a path, the name of a bundled one, or a Hugging Face hub id, downloaded unless cached.

    Raises:
        UserError: there is no such model.
    """
    name = str(path_or_name)
    names = ", ".join(BUNDLED_MODELS)
    if not name.strip():
        raise UserError(f"the name of the model is empty; give a folder, a hub id, or one of: {names}")
    folder = BUNDLED_MODELS.get(name, Path(path_or_name).expanduser())
    if (folder / MODEL_INDEX).is_file():
        return folder
    kind = describe_path(folder, MODEL_INDEX)
    if kind is not None:
        raise UserError(f"{folder}: {kind}")
    if HUB_ID.fullmatch(name) and not (folder.parent.exists() or folder.exists()):
        return download(name.removeprefix("hf:"), _DOWNLOADED)
    if not folder.exists() and (near := difflib.get_close_matches(name.lower(), BUNDLED_MODELS, n=1)):
        raise UserError(f"{folder}: no such folder; did you mean the bundled model {near[0]}?")
    raise UserError(f"{folder}: no model found ({MODEL_INDEX} is missing); give a folder, a hub id, or one of: {names}")


def component_folder(path_or_name: str) -> Path:
    """The folder with components: a bundled model's by its name, else the path."""
    return BUNDLED_MODELS.get(path_or_name, Path(path_or_name).expanduser())


def download(repository: str, patterns: Sequence[str]) -> Path:
    """The files of a hub repository that match patterns, in the hub's cache. Raises: UserError."""
    try:
        return Path(snapshot_download(repository, allow_patterns=[*patterns]))
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
        raise UserError(f"{file}: {describe_file(file) or f'cannot be read ({error})'}") from None
    return config


def load_component(folder: Path, name: str, dtype: torch.dtype | None = None, family: ModelFamily | None = None) -> Any:
    """Load one component of a model; modules are frozen and in eval mode.

    Args:
        dtype: of the weights; unset, the stored one.
        family: unset, the one that the folder's ``model_index.json`` names.

    Raises:
        UserError: it cannot be read, or weights are missing, unexpected or of other shapes; names them and the file.
    """
    family = family or resolve_family(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a model, or one of: {', '.join(BUNDLED_MODELS)}")
    if not (folder / name).is_dir():
        raise UserError(f"{folder / name}: no such folder; the model is incomplete, download or save it again")
    return load_component_from(folder / name, name, dtype, family)


def load_component_from(path: Path, name: str, dtype: torch.dtype | None, family: ModelFamily) -> Any:
    """Load a component from its own folder, of any name. Otherwise as :func:`load_component`."""
    if dtype == torch.float16 and not family.fp16:
        raise UserError(NO_FP16)
    try:
        with silence_loggers():
            if name in family.others:
                return family.load_other(name, path)
            stored = stored_dtype(path)  # even if `dtype` is given: it refuses what cannot be read
            module, info = family.load_module(name, path, dtype or stored)
    except UserError:
        raise
    except Exception as error:  # libraries raise many types for a bad file; the message must name it
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("Cannot load  because ")
        if isinstance(error, KeyError):
            reason = f"its files have no {reason}"
        names = tensor_names(path) if name in family.modules else set()
        if (kind := describe_tensors(names, names)) is not None:  # a LoRA adapter, or quantized
            raise UserError(f"{path}: seems to be {kind}") from None
        raise UserError(f"{path}: cannot be loaded: {reason.partition(' If you want')[0]}") from error
    _check_loading_info(path, info, module, family.key_layouts.values() if name == "transformer" else ())
    return module.eval().requires_grad_(False)


def _check_loading_info(path: Path, info: LoadingInfo, module: nn.Module, layouts: Iterable[KeyLayout]) -> None:
    """Raises: UserError if weights kept their initialization, or tensors were not used."""
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(_UNUSED))
    if missing or unexpected:
        names, wanted = tensor_names(path), set(module.state_dict())
        file = file_of_tensor(path, unexpected[0]) if unexpected else path
        renamed = max((len(wanted & layout.diffusers_names(names)) for layout in layouts), default=0)
        if renamed > max(len(wanted & names), len(wanted) / 2):
            command = f"fewstep convert {shlex.quote(str(file))} --components-from MODEL --out FOLDER"
            raise UserError(f"{file}: seems to have the tensor names of a single file, not of a folder; use {command}")
        kind = describe_tensors(names, wanted)
        if kind is not None:
            raise UserError(f"{file}: seems to be {kind}")
    mismatched = {key: (tuple(found), tuple(expected)) for key, found, expected in sorted(info["mismatched_keys"])}
    if mismatched:
        key, (found, expected) = next(iter(mismatched.items()))
        raise UserError(
            f"{file_of_tensor(path, key)}: {key} is {found}, expected {expected}{_more(len(mismatched) - 1)}"
        )
    if missing:
        raise UserError(f"{path}: {format_tensor_names('missing', missing)}")
    if unexpected:
        raise UserError(f"{file_of_tensor(path, unexpected[0])}: {format_tensor_names('unexpected', unexpected)}")


def format_tensor_names(problem: str, names: Sequence[str]) -> str:
    """ "missing tensors: a, b": the first few of them by name."""
    if len(names) == 1:
        return f"one {problem} tensor: {names[0]}"
    return f"{len(names)} {problem} tensors: {', '.join(names[:3])}{_more(len(names) - 3)}"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
