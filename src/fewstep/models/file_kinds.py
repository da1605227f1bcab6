"""What a file or a set of tensors seems to be, where it is not what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fewstep.errors import UserError

_SUPPORTED = "a Z-Image or Lumina transformer"
_SD3, _SD3_DIFFUSERS = "a Stable Diffusion 3 transformer", "a Stable Diffusion 3 transformer in diffusers' layout"
_FLUX, _FLUX_DIFFUSERS = "a FLUX or HunyuanVideo transformer", "a FLUX transformer in diffusers' layout"
_WAN = "a Wan transformer"
_FP8 = "scaled fp8"
_MERGE = "give it with --lora beside its base model, or merge it: fewstep lora merge MODEL FILE --out FOLDER"

#: First bytes of a file -> what it is.
_SIGNATURES: Mapping[bytes, str] = {
    b"GGUF": "a GGUF file; convert it with fewstep convert",
    b"PK\x03\x04": "a zip archive, such as a pickled PyTorch checkpoint, which could run code; save it as safetensors",
    b"\x80\x02": "a pickled checkpoint, which could run code; save it as safetensors",
    b"\x80\x03": "a pickled checkpoint, which could run code; save it as safetensors",
    b"\x80\x04": "a pickled checkpoint, which could run code; save it as safetensors",
    b"\x80\x05": "a pickled checkpoint, which could run code; save it as safetensors",
    b"\x89HDF": "an HDF5 file; save the model as safetensors",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"\x00\x05\x16\x07": "metadata that macOS left behind; delete it",
    b"version https://git-lfs": "a Git LFS pointer instead of the file; run git lfs pull",
    b"<!DOCTYPE": "a web page instead of the file; download it again",
    b"<!doctype": "a web page instead of the file; download it again",
    b"<html": "a web page instead of the file; download it again",
}

_LORA = (".lora_A", ".lora_B", ".lora_up", ".lora_down", ".lora.up", ".lora.down", ".hada_w1_a", ".lokr_w1", ".lora_E")

#: Ends of the names of tensors that only quantized checkpoints have -> the method.
_QUANTIZED: Mapping[str, str] = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".wscales": "SVDQuant",
    ".weight_scale": _FP8,
    ".scale_weight": _FP8,
    ".comfy_quant": "ComfyUI",
}

#: Parts of names -> the family of transformers or U-Nets that has all of them.
_FAMILIES: Mapping[tuple[str, ...], str] = {
    ("double_blocks.", "single_blocks."): _FLUX,
    ("single_transformer_blocks.", "x_embedder."): _FLUX_DIFFUSERS,
    ("joint_blocks.",): _SD3,
    ("transformer_blocks.", ".img_mod."): "a Qwen-Image transformer",
    ("transformer_blocks.", ".norm1_context."): _SD3_DIFFUSERS,
    ("input_blocks.", "middle_block."): "a Stable Diffusion U-Net",
    ("down_blocks.", "time_embedding."): "a Stable Diffusion U-Net in diffusers' layout",
    ("blocks.", ".cross_attn."): _WAN,
    ("blocks.", ".adaln_modulation_self_attn."): "a Cosmos transformer",
    ("transformer_blocks.", "caption_projection."): "a PixArt or SANA transformer",
    ("controlnet_",): "a ControlNet",
    ("control_layers.",): "a Z-Image ControlNet",
    ("context_refiner.", "noise_refiner."): _SUPPORTED,
}


def _quantized(method: str) -> str:
    return f"quantized ({method}); use the unquantized weights"


#: Descriptions of single files that may be convertible to a folder.
CONVERTIBLE = frozenset(
    {
        _SUPPORTED,
        _SD3,
        _SD3_DIFFUSERS,
        _FLUX,
        _FLUX_DIFFUSERS,
        _WAN,
        _quantized(_FP8),
        _quantized("ComfyUI"),
        _SIGNATURES[b"GGUF"],
    }
)


def describe_file(file: Path) -> str | None:
    """What a file that is no safetensors file is, and what to do; None if that cannot be said."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return None
    if not start:
        return "empty; download it again"
    return next((kind for signature, kind in _SIGNATURES.items() if start.startswith(signature)), None)


def describe_tensors(names: Collection[str], expected: Collection[str] = ()) -> str | None:
    """What a set of tensors seems to be, and what to do; None if that cannot be said.

    Args:
        names: of the tensors.
        expected: the names that were looked for. Tensors that have most of them are what was asked for, with some
            missing or in excess, unless they have all of them behind a prefix.
    """
    if _any(names, _LORA):
        return f"a LoRA adapter, which is no whole model; {_MERGE}"
    quantized = next((method for ending, method in _QUANTIZED.items() if _any(names, (ending,), str.endswith)), None)
    if quantized is not None:
        return f"quantized ({quantized}); use the unquantized weights"
    wanted = set(expected)
    if 2 * len(wanted.intersection(names)) > min(len(wanted), len(names)):
        return None
    prefix = _prefix(set(names), wanted)
    if prefix is not None:
        return f'the right tensors with "{prefix}" before every name; remove it from them'
    return _component(names) or _family(names)


def describe_weights(file: Path) -> str | None:
    """What a file of any kind seems to be, by its first bytes or its tensors."""
    try:
        with safe_open(file, "pt") as tensors:
            return describe_tensors(set(tensors.keys()))
    except (OSError, SafetensorError):
        return describe_file(file)


def refuse_other_files(file: Path) -> None:
    """Raises: UserError for a file that is there and, by its bytes or its tensors, no transformer's single file."""
    kind = describe_weights(file)
    if kind is not None and kind not in CONVERTIBLE:
        raise UserError(f"{file}: seems to be {kind}")


def describe_adapted(names: Collection[str]) -> str | None:
    """The family of models that the modules in a LoRA file are of, whatever the style of its names; None if that is not
    known."""
    flat = [name.replace(".", "_") for name in names]
    families = {tuple(part.replace(".", "_") for part in parts): kind for parts, kind in _FAMILIES.items()}
    known = (kind for parts, kind in families.items() if all(_any(flat, (part.lstrip("_"),)) for part in parts))
    return next((kind for kind in known if kind != _SUPPORTED), None)


def _prefix(names: set[str], expected: set[str]) -> str | None:
    """What precedes the expected names in all names, if most of the expected ones are there."""
    for name in sorted(expected, key=len, reverse=True)[:8]:
        for found in names:
            prefix = found.removesuffix(name)
            if found != prefix and prefix and 2 * sum(f"{prefix}{one}" in names for one in expected) > len(expected):
                return prefix
    return None


def _component(names: Collection[str]) -> str | None:
    """Another component than a transformer."""
    if _any(names, ("model.diffusion_model.",)) and _any(names, ("first_stage_model.", "vae.")):
        return None  # a whole checkpoint: its family is what matters
    if _any(names, ("decoder.",)) and _any(names, ("encoder.",)) and _any(names, (".conv_in.", "conv1.")):
        return "a VAE (autoencoder), not a transformer"
    if _any(names, ("embed_tokens.",)) and _any(names, (".self_attn.", ".attn.")):
        return "a language model or text encoder, not a transformer of latents"
    if _any(names, ("text_model.",)):
        return "a CLIP model, not a transformer of latents"
    if _any(names, ("exp_avg", "|")):
        return "a training checkpoint, not a model"
    return None


def _family(names: Collection[str]) -> str | None:
    return next((kind for parts, kind in _FAMILIES.items() if all(_any(names, (part,)) for part in parts)), None)


def _any(names: Iterable[str], parts: tuple[str, ...], test: Callable[[str, str], bool] = str.__contains__) -> bool:
    return any(test(name, part) for name in names for part in parts)
