"""The weight files of a component's folder: those that diffusers or transformers opens, and no others.

Both libraries open files by fixed names: one file, or the shards that an index names. Other files in the folder, such
as variants (``.fp16.``), copies, or what operating systems leave behind, must decide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.file_kinds import describe_file

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
INDEX = ".index.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_QUANTIZED = ("F8", "F4", "F6", "I8", "U8", "I4", "U4")  # starts of safetensors' names of storage types


def weight_files(folder: Path) -> list[Path]:
    """The files that the component's library reads its weights from.

    diffusers prefers an index to a single file, transformers a single file to an index. A component is diffusers' if
    its ``config.json`` has a ``_class_name``.

    Raises:
        UserError: there are none, with the reason; or an index is damaged, or names a file that is not there.
    """
    config = _read_json(folder / "config.json")
    if "_class_name" in config:
        single = folder / DIFFUSERS
        index = folder / f"{DIFFUSERS}{INDEX}"
        return _indexed(index) if index.is_file() else _single(single)
    single = folder / str(config.get("transformers_weights") or TRANSFORMERS)
    index = single if single.name.endswith(INDEX) else folder / f"{single.name}{INDEX}"
    return _indexed(index) if index.is_file() and (index == single or not single.is_file()) else _single(single)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype to load a component in by default, which rounds none of its weights: bf16 if all of its floating-point
    tensors are stored in bf16, else fp32.

    Raises:
        UserError: no weights can be read, or some are quantized: without their scales they would be noise.
    """
    stored = set[str]()
    for file in weight_files(folder):
        for name, storage in _storage_types(file):
            if storage.startswith(_QUANTIZED):
                raise UserError(
                    f"{file}: {name} is quantized ({storage}), which a model's folder cannot be read with; use the "
                    "unquantized model, or a single fp8 or GGUF file with fewstep convert"
                )
            stored.add(storage)
    return torch.bfloat16 if stored & _FLOATS == {"BF16"} else torch.float32


def file_of_tensor(folder: Path, key: str) -> Path:
    """The file that holds a tensor, from whose name the loader may have removed a prefix; else the folder."""
    for file in weight_files(folder):
        if any(name == key or name.endswith(f".{key}") for name, _ in _storage_types(file)):
            return file
    return folder


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors of a component's files. Raises: UserError."""
    return {name for file in weight_files(folder) for name, _ in _storage_types(file)}


def check_finite(folder: Path) -> None:
    """Check all numbers of a component's files, one tensor at a time. Raises: UserError that names the first tensor
    with an infinity or NaN."""
    for file in weight_files(folder):
        names = [name for name, storage in _storage_types(file) if storage in _FLOATS]
        with safe_open(file, "pt") as tensors:
            for name in names:
                refuse_non_finite(file, name, tensors.get_tensor(name))


def refuse_non_finite(file: str | Path, name: str, tensor: Tensor) -> None:
    """Raises: UserError if a tensor of a file has an infinity or NaN."""
    # aminmax keeps NaN, and needs no memory beside the tensor
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        count = int(tensor.isfinite().logical_not().sum())
        raise UserError(
            f"{file}: {name}: {count:,} of its {tensor.numel():,} numbers are infinite or NaN; the weights are damaged"
        )


def _storage_types(file: Path) -> Iterator[tuple[str, str]]:
    """Each tensor's name and storage type. Raises: UserError if it is not a safetensors file."""
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_slice(name).get_dtype()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {describe_file(file) or f'damaged, or not a safetensors file ({error})'}") from None


def _single(file: Path) -> list[Path]:
    if file.is_file():
        return [file]
    raise UserError(f"{file}: no such file{_explain_absence(file)}")


def _explain_absence(file: Path) -> str:
    """What is there in place of a weight file, and what to do."""
    others = sorted(path.name for path in file.parent.glob("[!.]*") if path.is_file())
    stem = file.name.removesuffix(".safetensors")
    variants = [name for name in others if name.startswith(f"{stem}.") and name.endswith((".safetensors", INDEX))]
    if variants:
        return f"; there is only the variant {variants[0]}, which is not read: rename it to {_unvaried(variants[0])}"
    pickled = [name for name in others if name.endswith(_PICKLED)]
    if pickled:
        return f"; {pickled[0]} is pickled and could run code: save the model with safe_serialization=True"
    misnamed = [name for name in others if name.endswith(".safetensors")]
    if misnamed:
        return f"; {misnamed[0]} has another name than its library reads"
    return ""


def _unvaried(name: str) -> str:
    """A file's name without its variant: model.fp16.safetensors -> model.safetensors."""
    ending = f".safetensors{INDEX}" if name.endswith(INDEX) else ".safetensors"
    return f"{name.partition('.')[0]}{ending}"


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of weight files (no weight_map); download it again") from None
    files = [index.parent / str(name) for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(str(name)).name != name:
            raise UserError(f"{index}: names {name!r}, which is not a plain file name")
        if not file.is_file():
            raise UserError(f"{index}: names {name}, which is not there; download it, or delete an index left over")
    if not files:
        raise UserError(f"{index}: names no weight files; download it again")
    return files


def _read_json(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the folder of a whole model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {describe_file(file) or f'cannot be read ({error})'}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a component's configuration (a JSON object)")
    return found
