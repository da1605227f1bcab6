"""Transformers in single files: safetensors with plain or fp8 weights, and GGUF.

fp8 matrices (plain, or with a scale for each matrix or row) and GGUF's blocks are dequantized. diffusers'
``from_single_file`` ignores the scales of fp8 matrices, without which images are noise, and only warns about tensors
that it does not use.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.components import format_tensor_names
from fewstep.models.family import ModelFamily
from fewstep.models.file_kinds import describe_file, describe_tensors
from fewstep.models.key_layout import KeyLayout, swap_halves
from fewstep.models.weight_files import refuse_non_finite

SCALES = (".scale_weight", ".weight_scale")  # of an fp8 matrix, beside it
STORAGE = ".comfy_quant"  # beside it too: its storage type, as JSON
HINTS = (".scale_input", ".input_scale", STORAGE)  # not needed for dequantized weights

_UNQUANTIZED = {"F64", "F32", "F16", "BF16"}

#: Reads one tensor of a file.
Read = Callable[[], Tensor]


def read_transformer(
    file: str | Path, family: ModelFamily, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Read a transformer from a single file in any of the family's key layouts.

    Weights are read one by one into a model on the meta device: no more memory is used than the model takes.

    Args:
        config: the transformer's ``config.json``, which a single file does not contain.
        dtype: of the model's weights.

    Raises:
        UserError: the file cannot be read, or tensors are missing, unexpected, of other shapes or of an unsupported
            storage type; names them.
    """
    if not family.key_layouts:
        raise UserError(f"{file}: single files of {family.pipeline_class} are not supported")
    layout = next(iter(family.key_layouts.values()))  # layouts of one family differ in the prefix they write
    with _open(Path(file)) as tensors:
        with torch.device("meta"):
            model = family.build("transformer", config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = _readers(file, tensors, layout, dtype, shapes)
        if found.keys() != shapes.keys() and (kind := describe_tensors(found.keys(), shapes.keys())) is not None:
            raise UserError(f"{file}: seems to be {kind}")
        for problem, names in (("missing", shapes.keys() - found.keys()), ("unexpected", found.keys() - shapes)):
            if names:
                raise UserError(f"{file}: {format_tensor_names(problem, sorted(names))}")
        for name, shape in shapes.items():
            weight = found[name]()
            if name.endswith(layout.flat_endings) and weight.numel() == math.prod(shape):
                weight = weight.reshape(shape)
            if tuple(weight.shape) != shape:
                raise UserError(f"{file}: {name} is {tuple(weight.shape)}, expected {shape}")
            refuse_non_finite(file, name, weight)
            _set_weight(model, name, weight)
    return model.eval()


def stored_dtype(file: str | Path) -> torch.dtype:
    """The dtype to read a file in by default: bf16 for quantized files and for those stored in bf16 alone; else fp32,
    which rounds nothing.

    Raises:
        UserError: the file cannot be read.
    """
    with _open(Path(file)) as tensors:
        stored = tensors.storage_types() if isinstance(tensors, _GGUFReader) else _storage_types(tensors)
        return torch.float32 if stored <= _UNQUANTIZED and stored != {"BF16"} else torch.bfloat16


class _GGUFReader:
    """A GGUF file with the interface of safetensors' reader: memory-mapped; tensors are dequantized to fp32."""

    def __init__(self, file: Path) -> None:
        gguf = import_gguf(file)
        try:
            self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        except (IndexError, KeyError, OverflowError, MemoryError) as error:  # of a file that was cut off
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def storage_types(self) -> set[str]:
        return {tensor.tensor_type.name for tensor in self._tensors.values()}

    def get_tensor(self, name: str) -> Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def import_gguf(file: str | Path) -> Any:
    """The ``gguf`` package, for a file. Raises: UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{file}: GGUF files need the gguf package; pip install 'fewstep[gguf]'") from None
    return gguf


def is_gguf(file: Path) -> bool:
    """Whether a file is GGUF, by its first bytes, or by its name where it is damaged."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF" or file.suffix.lower() == ".gguf"


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """A reader with ``keys`` and ``get_tensor``. Raises: UserError if the file cannot be read, also inside."""
    try:
        if is_gguf(file):
            yield _GGUFReader(file)
            return
        with safe_open(file, "pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, SafetensorError, ValueError) as error:
        gguf = is_gguf(file)
        damaged = f"not a {'gguf' if gguf else 'safetensors'} file, or damaged ({error})"
        raise UserError(f"{file}: {damaged if gguf else describe_file(file) or damaged}") from None


def _storage_types(tensors: Any) -> set[str]:
    return {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118


def _readers(
    file: str | Path, tensors: Any, layout: KeyLayout, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Read]:
    """The tensors of a file by diffusers' names, each with its reader."""
    keys = set(tensors.keys())
    for key in sorted(key for key in keys if key.endswith(STORAGE)):
        storage = json.loads(bytes(tensors.get_tensor(key).tolist())).get("format", "")
        if not storage.startswith("float8"):
            raise UserError(f"{file}: {key.removesuffix(STORAGE)}: unsupported storage type {storage}; use fp8 or bf16")
    others = {key for key in keys if layout.other_components and key.startswith(layout.other_components)}
    if others:
        warnings.warn(f"{file}: only the transformer is read, not the text encoder and autoencoder", stacklevel=3)
    keys = {key for key in keys - others if not key.endswith(HINTS)}
    found: dict[str, Read] = {}
    swapped = layout.swapped_starts(shapes)
    for key, bare in sorted(layout.without_prefix(keys).items()):
        if bare in layout.ignored or key.endswith(SCALES):
            continue
        names = list(layout.to_diffusers(bare))
        rows = [shapes[name][0] if shapes.get(name) else 0 for name, _ in names]
        for name, part in names:
            reader = _reader(file, tensors, key, keys, dtype, None if part is None else (part[0], rows))
            found[name] = _swapped(reader) if name != bare and name.startswith(swapped) else reader
    return found


def _swapped(read: Read) -> Read:
    return lambda: swap_halves(read())


def _reader(
    file: str | Path, tensors: Any, key: str, keys: set[str], dtype: torch.dtype, part: tuple[int, list[int]] | None
) -> Read:
    """Reads a tensor, or part (index, rows of all parts) of a fused one; fp8 is multiplied by its scale, if any."""
    stem = key.removesuffix(".weight")
    scale_key = next((stem + ending for ending in SCALES if stem + ending in keys and stem != key), None)

    def select(rows: Tensor) -> Tensor:
        # a part is taken before it is dequantized, and copied, so that the rest of the tensor is freed
        if part is None:
            return rows
        index, sizes = part
        if len(rows) != sum(sizes):
            raise UserError(f"{file}: {key} has {len(rows)} rows, expected {sum(sizes)}")
        return rows.split(sizes)[index].clone()

    def read() -> Tensor:
        weight = tensors.get_tensor(key)
        if not weight.is_floating_point():
            raise UserError(f"{file}: {key}: unsupported storage type {weight.dtype}; use fp8 or bf16")
        scale = tensors.get_tensor(scale_key).float() if scale_key is not None else torch.ones(0)
        if scale.numel() == 0:  # some files have an empty scale for matrices without one
            return select(weight).to(dtype)
        if scale.numel() not in (1, len(weight)):
            raise UserError(f"{file}: {scale_key} is {tuple(scale.shape)}, expected one scale, or one for each row")
        rows = (len(weight), *[1] * (weight.ndim - 1))
        scale = scale.reshape(-1, *rows[1:]).expand(rows)
        return (select(weight).float() * select(scale)).to(dtype)

    return read


def _set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Replace a tensor of a model on the meta device."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if last in owner._buffers:
        owner.register_buffer(last, weight)
    else:
        owner.register_parameter(last, nn.Parameter(weight, requires_grad=False))
