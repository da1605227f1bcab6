"""Reading LoRA files. What would be dropped silently elsewhere is refused here, by the key's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.file_kinds import describe_adapted, describe_file, describe_tensors
from fewstep.models.lora.config import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    AdapterConfig,
    header_config,
    read_peft_config,
)
from fewstep.models.lora.parts import split_key, unsupported_kind


@dataclass(frozen=True)
class RawLora:
    """A file's tensors by module, before anything is known about the model.

    Attributes:
        modules: the file's name of a module -> part (``parts.SPELLINGS``) -> tensor.
        keys: (module, part) -> the key.
        config: beside the file, or in its header.
        dtype: the widest in the file; the tensors are in fp32.
    """

    file: Path
    modules: Mapping[str, Mapping[str, Tensor]]
    keys: Mapping[tuple[str, str], str]
    metadata: Mapping[str, str]
    config: AdapterConfig | None
    dtype: torch.dtype = torch.float32


def weights_file(path: str | Path) -> Path:
    """The file with the weights: itself, or that of a folder that peft or diffusers wrote. Raises: UserError."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_dir():
        return path
    known = [path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if (path / name).is_file()]
    files = known or sorted(path.glob("[!.]*.safetensors"))
    if len(files) == 1:
        return files[0]
    what = f"{len(files)} LoRA files; name one of them" if files else "no LoRA in this folder"
    raise UserError(f"{path}: {what} ({PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS} is found by itself)")


def read_raw(path: str | Path, ignore: Sequence[str] = ()) -> RawLora:
    """Read a LoRA file, or a folder of peft or diffusers.

    Args:
        ignore: keys, or patterns such as ``text_encoder.*``, that are left out.

    Raises:
        UserError: it cannot be read, has no LoRA, or has keys that are not supported.
    """
    file = weights_file(path)
    tensors, metadata = _read_tensors(file, ignore)
    _refuse_unsupported(file, list(tensors))
    parts = {key: split_key(key) for key in tensors}
    unknown = [key for key, part in parts.items() if part is None]
    if len(unknown) == len(parts):
        kind = describe_tensors(unknown)
        raise UserError(f"{file}: no LoRA: {f'it seems to be {kind}' if kind else f'it has {_some(unknown)}'}")
    if unknown:
        raise UserError(f"{file}: {_some(unknown)}: no known part of an adapter; --ignore KEY leaves a key out")
    modules: dict[str, dict[str, Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, found in parts.items():
        assert found is not None
        if found in keys:
            raise UserError(f"{file}: {key} and {keys[found]} are the same part of one layer; --ignore one of them")
        keys[found] = key
        modules.setdefault(found[0], {})[found[1]] = _checked(file, key, found[1], tensors[key])
    beside = file.with_name(PEFT_CONFIG)
    config = header_config(file, metadata)
    if config is None and file.name == PEFT_WEIGHTS and beside.is_file():
        config = read_peft_config(beside)
        metadata = {"base_model_name_or_path": config.base, **metadata}
    return RawLora(file, modules, keys, metadata, config, _widest(tensors.values()))


def matching_patterns(path: str | Path, ignore: Sequence[str]) -> list[str]:
    """The patterns of ``ignore`` that match a key of a file. Raises: UserError if it cannot be read."""
    keys = _open_keys(weights_file(path)) if ignore else []
    return [pattern for pattern in ignore if any(fnmatchcase(key, pattern) for key in keys)]


def check_ignored(paths: Iterable[str | Path], ignore: Sequence[str]) -> None:
    """Raises: UserError for a pattern that matches no key of any of the files."""
    matched = {pattern for path in paths for pattern in matching_patterns(path, ignore)}
    if unused := [pattern for pattern in ignore if pattern not in matched]:
        raise UserError(f"--ignore {unused[0]}: no key of {', '.join(map(str, paths)) or 'a LoRA'} matches it")


def unbound_key_error(file: Path, keys: Sequence[str]) -> UserError:
    """The error for keys whose module is no layer of the model."""
    kind = describe_adapted(keys)
    hint = f" (it seems to be a LoRA for {kind})" if kind else ""
    return UserError(f"{file}: {_some(keys)} bind no layer of the model{hint}; --ignore KEY leaves a key out")


def _read_tensors(file: Path, ignore: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as tensors:
            keys = list(tensors.keys())
            kept = [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in ignore)]
            # what is no LoRA, such as a whole model, is not read
            wanted = kept if any(split_key(key) for key in kept) else []
            found = {key: tensors.get_tensor(key) if wanted else torch.empty(0) for key in kept}
            metadata = dict(tensors.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from None
    if not found:
        what = "all of its keys are ignored" if keys else "holds no tensors"
        raise UserError(f"{file}: {what}; there is no LoRA to load")
    return found, metadata


def _open_keys(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: {describe_file(file) or f'not a safetensors file, or damaged ({error})'}")


def _refuse_unsupported(file: Path, keys: Sequence[str]) -> None:
    """Raises: UserError for the first of the keys that is of a known kind of adapter that is not supported."""
    kinds = {key: kind for key in keys if (kind := unsupported_kind(key)) is not None}
    if kinds:
        key, kind = next(iter(kinds.items()))
        others = len(kinds) - 1
        more = f" ({others} more keys are not supported)" if others else ""
        raise UserError(f"{file}: {key} is {kind}{more}; --ignore KEY leaves a key out")


def _checked(file: Path, key: str, part: str, tensor: Tensor) -> Tensor:
    """A tensor in fp32. Raises: UserError if it cannot be a part of a linear layer's adapter."""
    if part != "alpha" and not tensor.is_floating_point():
        raise UserError(f"{file}: {key} is quantized ({tensor.dtype}); use the LoRA in bf16, fp16 or fp32")
    wide = tensor.float()
    if part == "alpha" and tensor.numel() != 1:
        raise UserError(f"{file}: {key} has {tensor.numel()} values; an alpha is one number")
    if part not in ("alpha", "magnitude") and tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
        raise UserError(f"{file}: {key} is a convolution's {list(tensor.shape)}; the model has linear layers alone")
    if part not in ("alpha", "magnitude"):
        wide = wide.flatten(1) if tensor.ndim == 4 else wide  # kohya's 1 x 1 convolutions are linear layers
        if wide.ndim != 2 or wide.numel() == 0:
            raise UserError(f"{file}: {key} is {list(tensor.shape)}; expected a matrix")
    if not wide.isfinite().all():
        raise UserError(f"{file}: {key} has values that are not finite; the training diverged, use another checkpoint")
    return wide


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds all matrices; fp8 counts as bf16."""
    dtypes = {torch.bfloat16 if one.dtype.itemsize == 1 else one.dtype for one in tensors if one.numel() > 1}
    return reduce(torch.promote_types, dtypes, next(iter(dtypes), torch.float32))


def _some(keys: Sequence[str]) -> str:
    """The first of the keys, and how many more there are."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more keys"
