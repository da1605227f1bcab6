"""Adapters in training: one on the layers that a recipe names, one from a file; and what of them goes into a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.adapters import AdapterLayer, adapter_layers, adapter_parameters, adapter_scale, add_adapter
from fewstep.models.linear_layers import matching_linears
from fewstep.models.lora.weights import Kronecker, Lora, LowRank, Update


def target_layers(transformer: nn.Module, endings: list[str], refiners: bool) -> list[str]:
    """The names of the linear layers with one of the endings; without ``refiners``, of the main blocks alone.

    Raises:
        UserError: an ending matches no layer.
    """
    names = [name.removesuffix(".base_layer") for name in matching_linears(transformer, endings, "target_modules")]
    return [name for name in names if refiners or "refiner" not in name]


@torch.no_grad()
def add_frozen_adapter(transformer: nn.Module, name: str, lora: Lora) -> None:
    """Add a LoRA file as an adapter that is not trained. Its layers may have different ranks and scales.

    Raises:
        UserError: it has LoKr or DoRA, which are no low-rank sums.
    """
    updates: dict[str, LowRank] = {}
    for layer, update in lora.updates.items():
        if not isinstance(update.change, LowRank) or update.magnitude is not None:
            raise UserError(
                f"{lora.file}: only a plain LoRA can be added while training, and {layer} is LoKr or DoRA; turn it "
                "into one: fewstep lora resize"
            )
        updates[layer] = update.change
    rank = max(change.rank for change in updates.values())
    add_adapter(transformer, name, rank, target_modules=list(updates))
    for key, parameter in adapter_parameters(transformer, name).items():
        parameter.requires_grad_(False)
        if parameter.is_meta:
            continue
        change = updates[key.partition(".lora_")[0]]
        parameter.zero_()  # a smaller rank leaves rows of A and columns of B unused
        if ".lora_A." in key:
            parameter[: change.rank] = change.down.to(parameter)
        else:
            parameter[:, : change.rank] = (change.scale * change.up).to(parameter)


@torch.no_grad()
def init_adapter(transformer: nn.Module, name: str, lora: Lora) -> None:
    """Give an adapter the weights of a LoRA file; on the meta device it has none.

    Raises:
        UserError: the file has another rank or other layers, or is no plain LoRA.
    """
    if any(parameter.is_meta for parameter in adapter_parameters(transformer, name).values()):
        return
    own = adapter_updates(transformer, name)
    for layer in (*own, *lora.updates):
        update = lora.updates.get(layer)
        fits = update is not None and layer in own and isinstance(update.change, LowRank)
        if not fits or update.magnitude is not None or update.change.rank != own[layer].change.rank:  # type: ignore[union-attr]
            raise UserError(
                f"adapter.init: {lora.file} does not fit the recipe's adapter at {layer}: rank and layers must be "
                "equal, and it must be a plain LoRA"
            )
    for key, parameter in adapter_parameters(transformer, name).items():
        layer, _, part = key.partition(".lora_")
        change, scale = lora.updates[layer].change, own[layer].change.scale  # type: ignore[union-attr]
        assert isinstance(change, LowRank)
        parameter.copy_(change.down if part.startswith("A") else change.scale / scale * change.up)


def adapter_updates(transformer: nn.Module, name: str) -> Mapping[str, Update]:
    """What an adapter does to each layer, by diffusers' names, on the CPU; for ``write_lora``."""
    found: dict[str, Update] = {}
    paths = {id(part): path for path, part in transformer.named_modules()}
    for layer in adapter_layers(transformer):
        if name in layer.scaling:
            found[paths[id(layer)]] = _update(layer, name)
    return found


def _update(layer: AdapterLayer, name: str) -> Update:
    scale = adapter_scale(layer, name)
    if isinstance(layer, LoraLayer):
        down, up = (_kept(part[name].weight) for part in (layer.lora_A, layer.lora_B))  # type: ignore[arg-type]
        magnitudes = layer.lora_magnitude_vector
        magnitude = _kept(magnitudes[name].weight).reshape(-1, 1) if name in magnitudes else None  # type: ignore[arg-type]
        return Update(LowRank(down, up, scale), magnitude)
    whole = ((layer.lokr_w1,), (layer.lokr_w2,))
    products = ((layer.lokr_w1_a, layer.lokr_w1_b), (layer.lokr_w2_a, layer.lokr_w2_b))
    left, right = (
        tuple(_kept(part[name]) for part in (one if name in one[0] else pair))
        for one, pair in zip(whole, products, strict=True)
    )
    return Update(Kronecker(left, right, scale))


def _kept(parameter: Tensor) -> Tensor:
    """A copy in fp32 on the CPU."""
    return parameter.detach().to("cpu", torch.float32, copy=True)
