"""A component's weights as one file: safetensors, with matrices in bf16 or ComfyUI's scaled fp8, or GGUF.

Only matrices of repeated blocks are quantized: embeddings, modulation, norms and final layers keep bf16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.atomic import atomic_file, write_tensors
from fewstep.export.q4_k import BLOCK, quantize_q4_k
from fewstep.export.quantization_error import StoredTensor
from fewstep.models.quantize import FP8
from fewstep.models.single_file import STORAGE, import_gguf
from fewstep.progress import Advance

_FP8_FORMAT = json.dumps({"format": "float8_e4m3fn"}).encode()


@dataclass(frozen=True)
class NamedWeights:
    """A component's weights by the names of a file format.

    Attributes:
        tensors: by name.
        matrices: names of those that may be quantized, each [out, in].
    """

    tensors: Mapping[str, Tensor]
    matrices: frozenset[str]


def write_safetensors(file: Path, weights: NamedWeights, fp8: bool, advance: Advance) -> list[StoredTensor]:
    """Write all weights in bf16; with ``fp8`` the matrices in e4m3, each with one scale, as ComfyUI reads them.

    Args:
        advance: called with the number of tensors that are done.

    Raises:
        UserError: the file cannot be written.
    """
    written: dict[str, Tensor] = {}
    stored: list[StoredTensor] = []
    for name, tensor in weights.tensors.items():
        if fp8 and name in weights.matrices:
            quantized, scale = _scaled_fp8(tensor)
            stem = name.removesuffix(".weight")
            marker = torch.frombuffer(bytearray(_FP8_FORMAT), dtype=torch.uint8)
            written |= {name: quantized, f"{stem}.weight_scale": scale, f"{stem}{STORAGE}": marker}
            values = quantized.float() * scale
            stored.append(StoredTensor.measure(name, "fp8", quantized.nbytes + 4, values, tensor))
        else:
            written[name] = tensor.bfloat16()
            stored.append(StoredTensor.measure(name, "bf16", written[name].nbytes, written[name], tensor))
        advance(1)
    write_tensors(file, written, {"format": "pt"})
    return stored


def _scaled_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers and the scale, a scalar in fp32, that maps the largest to the largest of e4m3."""
    wide = matrix.float()
    scale = (wide.abs().amax() / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).to(FP8), scale


def write_gguf(
    file: Path, architecture: str, weights: NamedWeights, quantize: str | None, advance: Advance
) -> list[StoredTensor]:
    """Write a GGUF file: vectors in fp32, all else in bf16 or, the matrices, in ``quantize``, one tensor at a time.

    Args:
        architecture: ``general.architecture``.
        quantize: "q8_0" or "q4_k"; None is bf16. Rows that do not divide into its blocks are q8_0, or bf16.
        advance: called with the number of tensors that are done.

    Raises:
        UserError: the ``gguf`` package is not installed, or the file cannot be written.
    """
    gguf = import_gguf(file)
    formats = {
        name: _gguf_format(tensor, quantize if name in weights.matrices else None)
        for name, tensor in weights.tensors.items()
    }
    stored: list[StoredTensor] = []
    with atomic_file(file) as aside:
        writer = gguf.GGUFWriter(aside, architecture)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in weights.tensors.items():
            form = gguf.GGMLQuantizationType[formats[name]]
            block, block_bytes = gguf.GGML_QUANT_SIZES[form]
            size = tensor.numel() // block * block_bytes
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for name, tensor in weights.tensors.items():
                data = _encode(gguf, tensor.float().contiguous(), formats[name])
                writer.write_tensor_data(data)
                read = gguf.dequantize(data, gguf.GGMLQuantizationType[formats[name]])
                values = torch.from_numpy(read).reshape(tensor.shape)
                stored.append(StoredTensor.measure(name, formats[name].lower(), data.nbytes, values, tensor))
                advance(1)
        finally:
            writer.close()
    return stored


def _gguf_format(tensor: Tensor, quantize: str | None) -> str:
    if tensor.numel() == tensor.shape[-1]:  # vectors, pad tokens [1, D]
        return "F32"
    if quantize == "q4_k" and tensor.shape[-1] % BLOCK == 0:
        return "Q4_K"
    if quantize is not None and tensor.shape[-1] % 32 == 0:
        return "Q8_0"
    return "BF16"


def _encode(gguf: Any, tensor: Tensor, form: str) -> np.ndarray[Any, Any]:
    if form == "Q4_K":
        return quantize_q4_k(tensor).numpy()
    if form == "F32":  # of the values in bf16, as everything else
        tensor = tensor.bfloat16().float()
    encoded: np.ndarray[Any, Any] = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType[form])
    return encoded
