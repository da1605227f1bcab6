"""LoRA files as other programs write them: explicit key names, by code that is independent of the project's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

#: The layers that the examples adapt.
LAYERS = (
    *(f"layers.0.attention.to_{letter}" for letter in "qkv"),
    *("layers.0.attention.to_out.0", "layers.1.feed_forward.w2", "context_refiner.0.attention.to_q"),
    "noise_refiner.0.feed_forward.w1",
)

#: A layer -> down [r, in], up [out, r], alpha.
Adapter = dict[str, tuple[Tensor, Tensor, float]]


def adapter_for(transformer, layers=LAYERS, rank=3, alpha=1.5, seed=0) -> Adapter:
    """Random matrices. The last layer has another rank."""
    torch.manual_seed(seed)
    found = {}
    for layer in layers:
        weight = transformer.get_submodule(layer).weight
        own = rank + 1 if layer == layers[-1] else rank
        found[layer] = (0.2 * torch.randn(own, weight.shape[1]), 0.2 * torch.randn(weight.shape[0], own), alpha)
    return found


def deltas(adapter: Adapter, scaled=True) -> dict[str, Tensor]:
    """What the matrices add to each layer's weight."""
    return {layer: (alpha / len(down) if scaled else 1.0) * up @ down for layer, (down, up, alpha) in adapter.items()}


def diffusers(adapter: Adapter, prefix="transformer.") -> dict[str, Tensor]:
    """diffusers and peft: no alpha."""
    file = {}
    for layer, (down, up, _) in adapter.items():
        file[f"{prefix}{layer}.lora_A.weight"], file[f"{prefix}{layer}.lora_B.weight"] = down, up
    return file


def ai_toolkit(adapter: Adapter) -> dict[str, Tensor]:
    return diffusers(adapter, "diffusion_model.")


def with_alphas(adapter: Adapter, prefix="diffusion_model.") -> dict[str, Tensor]:
    alphas = {f"{prefix}{layer}.alpha": torch.tensor(alpha) for layer, (_, _, alpha) in adapter.items()}
    return diffusers(adapter, prefix) | alphas


def kohya(adapter: Adapter) -> dict[str, Tensor]:
    """musubi-tuner: ``lora_unet_layers_0_attention_to_q.lora_down.weight``."""
    file = {}
    for layer, (down, up, alpha) in adapter.items():
        name = "lora_unet_" + layer.replace(".", "_")
        file[f"{name}.lora_down.weight"], file[f"{name}.lora_up.weight"] = down, up
        file[f"{name}.alpha"] = torch.tensor(alpha)
    return file


def dotted(adapter: Adapter) -> dict[str, Tensor]:
    file = {}
    for layer, (down, up, _) in adapter.items():
        file[f"diffusion_model.{layer}.lora.down.weight"] = down
        file[f"diffusion_model.{layer}.lora.up.weight"] = up
    return file


def peft_named(adapter: Adapter) -> dict[str, Tensor]:
    """peft's names in memory, with the adapter's."""
    return {key.replace(".weight", ".default.weight"): tensor for key, tensor in diffusers(adapter, "").items()}


def original(name: str) -> str:
    return name.replace("attention.to_out.0", "attention.out")


def fused(adapter: Adapter, prefix="diffusion_model.", down="lora_A.weight", up="lora_B.weight", flat=False):
    """ComfyUI, and kohya on the original release's modules: one adapter on ``attention.qkv``, with an alpha.

    Returns the file, and what it adds to each layer by diffusers' names.
    """
    file, expected = {}, {}
    for layer, (lower, upper, alpha) in adapter.items():
        if layer.endswith(("to_k", "to_v")):
            continue
        name = original(layer)
        if layer == "layers.0.attention.to_q":
            name = "layers.0.attention.qkv"
            upper = torch.cat([adapter[f"layers.0.attention.to_{letter}"][1] for letter in "qkv"])
            for letter, rows in zip("qkv", upper.chunk(3), strict=True):
                expected[f"layers.0.attention.to_{letter}"] = alpha / len(lower) * rows @ lower
        elif layer == "context_refiner.0.attention.to_q":  # keys and values are left alone
            name = "context_refiner.0.attention.qkv"
            upper = torch.cat([upper, 0 * upper, 0 * upper])
            expected |= {f"context_refiner.0.attention.to_{x}": 0 * lower.T @ lower for x in "kv"}
            expected[layer] = alpha / len(lower) * upper.chunk(3)[0] @ lower
        else:
            expected[layer] = alpha / len(lower) * upper @ lower
        name = prefix + (name.replace(".", "_") if flat else name)
        file |= {f"{name}.{down}": lower, f"{name}.{up}": upper, f"{name}.alpha": torch.tensor(alpha)}
    return file, expected


def lokr(transformer, layer="layers.1.feed_forward.w2", factor=4, rank=None, alpha=2.0):
    """LyCORIS: a Kronecker product, of whole matrices or with ``lokr_w2`` of a rank. Parts, and what they add."""
    out, inner = transformer.get_submodule(layer).weight.shape
    w1, w2 = 0.3 * torch.randn(factor, factor), 0.3 * torch.randn(out // factor, inner // factor)
    parts, scale = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(alpha)}, 1.0
    if rank is not None:
        a, b = 0.3 * torch.randn(out // factor, rank), 0.3 * torch.randn(rank, inner // factor)
        parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(alpha)}
        w2, scale = a @ b, alpha / rank
    product = (w1[:, None, :, None] * w2[None, :, None, :]).reshape(out, inner)
    return parts, scale * product


def keyed(prefix: str, layer: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    name = layer.replace(".", "_") if prefix.endswith("_") else layer
    return {f"{prefix}{name}.{part}": tensor for part, tensor in parts.items()}


def save(file: Path, tensors: dict[str, Tensor], metadata=None, dtype=None) -> Path:
    stored = {key: (tensor if dtype is None else tensor.to(dtype)).contiguous() for key, tensor in tensors.items()}
    save_file(stored, file, metadata)
    return file


def save_peft_folder(folder: Path, adapter: Adapter, config: dict) -> Path:
    folder.mkdir()
    save_file(diffusers(adapter, "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def found_deltas(tiny, lora):
    return {name: update.delta(tiny.transformer.get_submodule(name).weight) for name, update in lora.updates.items()}


def assert_close(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, **tolerances)


def merged_by_hand(tiny, *weighted):
    """A copy of the transformer with changes {layer: delta} times strengths."""
    transformer = copy.deepcopy(tiny.transformer)
    with torch.no_grad():
        for changes, strength in weighted:
            for layer, delta in changes.items():
                transformer.get_submodule(layer).weight += strength * delta
    return transformer
