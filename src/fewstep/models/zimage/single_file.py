"""Transformers in one file: the original release's names and ComfyUI's, read and written; GGUF, read.

What differs from diffusers' names: queries, keys and values lie fused in one ``attention.qkv``, some parts are called
otherwise, and ComfyUI puts ``model.diffusion_model.`` before everything; a whole checkpoint has text encoder and
autoencoder besides. Weights of 8 bits (plain, or with a scale for each matrix or row) and GGUF's blocks are widened
when they are read. diffusers' own names in one file are read too.

diffusers' ``from_single_file`` reads some of these, but knows no scales of 8-bit matrices, without which images are
noise, and only warns of tensors that it has no place for.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ZImageTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.components import format_tensor_names

KeyLayout = Literal["original", "comfyui"]

#: Parts of names, ours (diffusers') and the original release's.
RENAMED = {
    "all_x_embedder.2-1.": "x_embedder.",
    "all_final_layer.2-1.": "final_layer.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}
QKV = (".attention.to_q.", ".attention.to_k.", ".attention.to_v.")
FUSED = ".attention.qkv."
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
SCALES = (".scale_weight", ".weight_scale")  # of a matrix in 8 bits, beside it
KIND = ".comfy_quant"  # beside it too: how it is stored, as JSON
HINTS = (".scale_input", ".input_scale", KIND)  # of no use once a matrix is widened
OTHERS = ("norm_final.weight", "scaled_fp8")  # in some files, and part of no model
OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")  # of a whole checkpoint

#: How a tensor of a file is read once it is wanted.
Read = Callable[[], Tensor]


def read_transformer(
    file: str | Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> ZImageTransformer2DModel:
    """A transformer out of a single file, in any of the namings.

    The weights are read one by one into a model that has none of its own, so that no more memory is needed than the
    model takes.

    Args:
        config: of the transformer, as in diffusers' ``config.json``: a single file does not say it.
        dtype: of the weights when they are read.

    Raises:
        UserError: the file cannot be read, or tensors are missing, left over, of other shapes or stored in ways that
            are not known; it names them.
    """
    with _opened(Path(file)) as tensors:
        found = _by_our_names(file, tensors, dtype)
        with torch.device("meta"):
            model = ZImageTransformer2DModel.from_config(dict(config))
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        _refuse_others(file, wanted, found)
        for name, shape in wanted.items():
            weight = found[name]()
            if name.endswith("pad_token"):  # some files have them as rows, some without the first dimension
                weight = weight.reshape(shape) if weight.numel() == torch.Size(shape).numel() else weight
            if tuple(weight.shape) != shape:
                raise UserError(f"{file}: {name} is {tuple(weight.shape)}, the model's is {shape}")
            _put(model, name, weight)
    return model.eval()


def write_transformer(
    model: ZImageTransformer2DModel, file: str | Path, naming: KeyLayout, dtype: torch.dtype | None = None
) -> Path:
    """The transformer's weights as one file with the original release's names, or ComfyUI's; moved into place whole.

    Args:
        dtype: to write in; None is what the model has.
    """
    prefix = PREFIXES[0] if naming == "comfyui" else ""
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if QKV[0] in name:
            parts = [weights[name.replace(QKV[0], part)] for part in QKV]
            named[prefix + name.replace(QKV[0], FUSED)] = torch.cat(parts)
        elif not any(part in name for part in QKV):
            named[prefix + _replaced(name, RENAMED)] = tensor.contiguous()
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.partial")
    save_file(named, aside, {"format": "pt"})
    aside.replace(file)
    return file


class _Gguf:
    """A GGUF file as safetensors' reader: memory-mapped, each tensor widened to fp32 when it is asked for."""

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise UserError(f"{file}: GGUF files need gguf; pip install 'fewstep[gguf]'") from None
        self._tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def kinds(self) -> Counter[str]:
        found = Counter[str]()
        for tensor in self._tensors.values():
            found[tensor.tensor_type.name] += int(tensor.n_elements)
        return found

    def get_tensor(self, name: str) -> Tensor:
        from gguf import dequantize

        found = self._tensors[name]
        return torch.from_numpy(dequantize(found.data, found.tensor_type).copy())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """What has the keys of a file, and gets its tensors. Raises: UserError, if it cannot be read, then or inside."""
    try:
        if file.suffix == ".gguf":
            yield _Gguf(file)
            return
        with safe_open(file, "pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: not a {file.suffix[1:] or 'safetensors'} file, or damaged ({error})") from None


def stored_dtype(file: str | Path) -> torch.dtype:
    """In which precision a file is to be read where nobody says: fp32 if most of its weights are stored in fp32 or
    fp16, else bf16.

    Raises:
        UserError: the file cannot be read.
    """
    with _opened(Path(file)) as tensors:
        kinds = tensors.kinds() if isinstance(tensors, _Gguf) else _kinds(tensors)
        long = sum(count for kind, count in kinds.items() if kind in ("F64", "F32", "F16"))
        return torch.float32 if 2 * long > kinds.total() else torch.bfloat16


def _kinds(tensors: Any) -> Counter[str]:
    """How many numbers are stored in which way."""
    found = Counter[str]()
    for key in tensors.keys():  # noqa: SIM118
        part = tensors.get_slice(key)
        found[part.get_dtype()] += math.prod(part.get_shape())
    return found


def _by_our_names(file: str | Path, tensors: Any, dtype: torch.dtype) -> dict[str, Read]:
    """What is in a file, by diffusers' names, each to be read when it is asked for."""
    keys = set(tensors.keys())
    for key in sorted(key for key in keys if key.endswith(KIND)):
        kind = json.loads(bytes(tensors.get_tensor(key).tolist())).get("format", "")
        if not kind.startswith("float8"):
            raise UserError(
                f"{file}: {key.removesuffix(KIND)} is stored as {kind}, which is not read; fp8 and bf16 are"
            )
    others = {key for key in keys if key.startswith(OTHER_PARTS)}
    if others:
        warnings.warn(f"{file}: only its transformer is read, not its text encoder and autoencoder", stacklevel=3)
    keys = {key for key in keys - others if not key.endswith(HINTS)}
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys)), "")
    scales = {key for key in keys if key.endswith(SCALES)}
    found: dict[str, Read] = {}
    for key in sorted(keys - scales):
        name = key.removeprefix(prefix)
        if name in OTHERS:
            continue
        if FUSED in name:
            for third, part in enumerate(QKV):
                found[name.replace(FUSED, part)] = _reader(file, tensors, key, keys, dtype, third)
        else:
            already = any(ours in name for ours in list(RENAMED)[:2])
            back = {theirs: ours for ours, theirs in RENAMED.items()}
            found[name if already else _replaced(name, back)] = _reader(file, tensors, key, keys, dtype)
    return found


def _reader(
    file: str | Path, tensors: Any, key: str, keys: set[str], dtype: torch.dtype, third: int | None = None
) -> Read:
    """Reads one tensor, or queries, keys or values out of a fused one; 8 bits come times their scale, if they have one.

    A third is taken before it is widened, and has memory of its own.
    """
    stem = key.removesuffix(".weight")
    scale = next((stem + ending for ending in SCALES if stem + ending in keys and stem != key), None)

    def part(rows: Tensor) -> Tensor:
        return rows if third is None else rows.chunk(3)[third].clone()

    def read() -> Tensor:
        weight = tensors.get_tensor(key)
        if not weight.is_floating_point():
            raise UserError(f"{file}: {key} is stored as {weight.dtype}, which is not read; fp8 and bf16 are")
        factor = tensors.get_tensor(scale).float() if scale is not None else torch.ones(0)
        if factor.numel() == 0:  # some files have a place for it, and nothing there
            return part(weight).to(dtype)
        if factor.numel() not in (1, len(weight)):
            raise UserError(f"{file}: {scale} is {tuple(factor.shape)}; one scale is known, or one for each row")
        factor = factor.reshape(-1, *[1] * (weight.ndim - 1)).expand(len(weight), *[1] * (weight.ndim - 1))
        return (part(weight).float() * part(factor)).to(dtype)

    return read


def _refuse_others(file: str | Path, wanted: Mapping[str, Any], found: Mapping[str, Read]) -> None:
    for what, names in (("missing", wanted.keys() - found.keys()), ("of no part of the model", found.keys() - wanted)):
        if names:
            raise UserError(f"{file}: {format_tensor_names(what, sorted(names))}")


def _put(model: torch.nn.Module, name: str, weight: Tensor) -> None:
    """A weight in place of the model's own, which is on the meta device."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if last in owner._buffers:
        owner.register_buffer(last, weight)
    else:
        owner.register_parameter(last, torch.nn.Parameter(weight, requires_grad=False))


def _replaced(name: str, pairs: Mapping[str, str]) -> str:
    for old, new in pairs.items():
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name
