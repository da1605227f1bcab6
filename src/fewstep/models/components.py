"""A model's parts out of a folder in diffusers' layout, by diffusers' and transformers' own loaders: nothing is left
as it was initialised, nothing is pickled, and no more memory is taken than the weights need."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Model
from transformers.utils import logging as transformers_logging

from fewstep.errors import UserError

BUNDLED_MODELS = {"micro": Path(__file__).parent.parent / "assets" / "micro"}

_HUB_ID = re.compile(r"(hf:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADED = ["*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.jinja"]

NO_FP16 = "fp16: activations of this family of models overflow in it; take bf16"

#: Weights that a released text encoder has, and that hidden states do without.
_SPARE = ("lm_head.",)

_Report = Mapping[str, Any]

_MODELS: dict[str, Callable[[Path, torch.dtype], tuple[nn.Module, _Report]]] = {
    "transformer": lambda path, dtype: ZImageTransformer2DModel.from_pretrained(
        path, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    ),
    "vae": lambda path, dtype: AutoencoderKL.from_pretrained(
        path, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    ),
    "text_encoder": lambda path, dtype: Qwen3Model.from_pretrained(
        path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    ),
}
_OTHERS: dict[str, Callable[[Path], Any]] = {
    "tokenizer": Qwen2Tokenizer.from_pretrained,
    "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained,
}
COMPONENTS = (*_MODELS, *_OTHERS)


def resolve_model(path_or_name: str | Path) -> Path:
    """The folder of a model: a path, the name of one that ships, or an id of the Hugging Face hub, which is downloaded
    unless it was before.

    Raises:
        UserError: there is none.
    """
    name = str(path_or_name)
    folder = BUNDLED_MODELS.get(name, Path(path_or_name))
    if (folder / "model_index.json").is_file():
        return folder
    if folder.suffix in (".safetensors", ".gguf"):
        raise UserError(
            f"{folder}: a single file; make a folder of it first: fewstep convert {folder} --base MODEL --out FOLDER"
        )
    if _HUB_ID.fullmatch(name) and not (folder.parent.exists() or folder.exists()):
        return _downloaded(name.removeprefix("hf:"))
    names = ", ".join(BUNDLED_MODELS)
    raise UserError(
        f"{folder}: no model there (model_index.json is missing); give a folder, a hub id, or a name: {names}"
    )


def _downloaded(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=_DOWNLOADED))
    except LocalEntryNotFoundError:
        reason = "it was not downloaded before, and the hub cannot be reached"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{repository}: no such folder, and not to be had from the Hugging Face hub: {reason}")


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A part's ``config.json``. Raises: UserError."""
    file = folder / name / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    return config


def stored_dtype(path: Path) -> torch.dtype:
    """In which precision a part is to be loaded where nobody says: bf16 if its weights are stored so, else fp32."""
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            stored = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        return torch.bfloat16 if stored == {"BF16"} else torch.float32
    return torch.float32


def load_component(folder: Path, name: str, dtype: torch.dtype | None = None) -> Any:
    """A part of a model; what has weights is frozen, and in eval mode.

    Args:
        dtype: of the weights; unset, their own.

    Raises:
        UserError: it cannot be read, or weights are missing, left over or of other shapes; it names them and the file.
    """
    if dtype == torch.float16:
        raise UserError(NO_FP16)
    path = folder / name
    try:
        with silence_loggers():
            if name in _OTHERS:
                return _OTHERS[name](path)
            part, report = _MODELS[name](path, dtype or stored_dtype(path))
    except Exception as error:  # whatever a library makes of a bad file, the user needs its name
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be loaded: {reason.partition(' If you want')[0]}") from error
    _check_loading_info(path, report)
    return part.eval().requires_grad_(False)


def _check_loading_info(path: Path, report: _Report) -> None:
    """Raises: UserError, if the loader had to leave weights as they were initialised, or weights were left over."""
    extra = sorted(key for key in report["unexpected_keys"] if not key.startswith(_SPARE))
    other = {key: (tuple(found), tuple(wanted)) for key, found, wanted in report["mismatched_keys"]}
    missing = sorted(report["missing_keys"])
    if other:
        key, (found, wanted) = next(iter(other.items()))
        raise UserError(f"{_file_of(path, key)}: {key} is {found}, the model's is {wanted}{_more(len(other) - 1)}")
    for what, names in (("missing", missing), ("of no part of the model", extra)):
        if names:
            where = path if what == "missing" else _file_of(path, names[0])
            raise UserError(f"{where}: {format_tensor_names(what, names)}")


def format_tensor_names(what: str, names: Sequence[str]) -> str:
    """What is wrong with some tensors, the first few of them by name."""
    return f"{len(names)} tensors are {what}: {', '.join(names[:3])}{_more(len(names) - 3)}"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _file_of(path: Path, key: str) -> Path:
    """The file that holds a tensor; the loader may have cut a prefix off its name."""
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
    """Silences the libraries' progress bars, and warnings of what is said here otherwise."""
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
