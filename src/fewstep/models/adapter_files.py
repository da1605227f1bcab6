"""Adapters on disk: merged into plain weights, and as a LoRA file that diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.adapters import active_adapters, adapter_layers, adapter_parameters, is_adapter_key

WEIGHTS_NAME = "diffusion_pytorch_model"
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"  # in a folder of diffusers' save_lora_weights


@torch.no_grad()
def write_merged(
    folder: Path, transformer: Any, adapters: Mapping[str, float], base: nn.Module | None = None, shard: str = "4GB"
) -> None:
    """Write a plain transformer with adapters {name: scale} added to its weights, one file at a time: no second copy of
    the model is needed in memory.

    Args:
        base: the model whose weights the adapters are added to; unset, the transformer's own.
        shard: largest size of a file.
    """
    own = (base or transformer).state_dict()
    weights = {key.replace(".base_layer.", "."): tensor for key, tensor in own.items() if not is_adapter_key(key)}
    layers = {f"{path}.weight": part for path, part in transformer.named_modules() if isinstance(part, LoraLayer)}

    def merged(key: str) -> Tensor:
        if key not in layers:
            return weights[key].cpu().contiguous()
        deltas = [layers[key].get_delta_weight(name) for name in adapters if name in layers[key].scaling]  # type: ignore[attr-defined]
        total = sum(deltas[1:], start=deltas[0]) if deltas else torch.zeros_like(weights[key])
        return (weights[key].to(total) + total).to("cpu", weights[key].dtype).contiguous()

    folder.mkdir(parents=True)
    transformer.save_config(folder)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern=WEIGHTS_NAME + "{suffix}.safetensors", max_shard_size=shard
    )
    with active_adapters(transformer, adapters):  # get_delta_weight includes the scale
        for file, keys in split.filename_to_tensors.items():
            save_file({key: merged(key) for key in keys}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        content = json.dumps(index, indent=2) + "\n"
        (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(content, encoding="utf-8")


def adapter_state_dict(transformer: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's weights by peft's names, with ``alpha / rank`` multiplied into B, so that readers need no alpha."""
    (scaling,) = {layer.scaling[name] for layer in adapter_layers(transformer) if name in layer.scaling}
    weights = get_peft_model_state_dict(transformer, adapter_name=name)
    return {key: tensor * scaling if "lora_B" in key else tensor for key, tensor in weights.items()}


def read_adapter(file: Path) -> dict[str, Tensor]:
    """The weights in a file that ``ModelFamily.write_lora`` wrote, by their names in the transformer.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None
    return {key.removeprefix("transformer."): tensor for key, tensor in found.items()}


@torch.no_grad()
def set_adapter(transformer: nn.Module, name: str, weights: Mapping[str, Tensor], scale: float = 1.0) -> bool:
    """Give an adapter the weights of :func:`read_adapter`, and say whether they fit; nothing changes if they do not.

    Args:
        scale: ``alpha / rank`` of the adapter: the weights have theirs in B.
    """
    own = {key.replace(f".{name}.", "."): p for key, p in adapter_parameters(transformer, name).items()}
    if {key: p.shape for key, p in own.items()} != {key: tensor.shape for key, tensor in weights.items()}:
        return False
    for key, parameter in own.items():
        parameter.copy_(weights[key] / scale if "lora_B" in key else weights[key])
    return True
