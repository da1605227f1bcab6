"""Binding a LoRA file to a transformer's layers: every key must bind, and at least one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.lora.read import RawLora, check_ignored, read_raw, unbound_key_error
from fewstep.models.lora.targets import LoraTargets
from fewstep.models.lora.weights import Change, Kronecker, Lora, LowRank, Update


def read_lora(path: str | Path, targets: LoraTargets, ignore: Sequence[str] = ()) -> Lora:
    """Read a LoRA file in any of the formats of docs/lora.md.

    Args:
        ignore: keys, or patterns of keys, that are left out; each must match a key.

    Raises:
        UserError: it cannot be read, or a key is not supported, binds no layer, or has another shape than the layer.
    """
    check_ignored([path], ignore)
    return bind(read_raw(path, ignore), targets)


def bind(raw: RawLora, targets: LoraTargets) -> Lora:
    """Errors as for :func:`read_lora`."""
    resolved = {module: targets.resolve(module) for module in raw.modules}
    unbound = [key for (module, _), key in raw.keys.items() if resolved[module] is None]
    if unbound:
        raise unbound_key_error(raw.file, unbound)
    updates: dict[str, Update] = {}
    owners: dict[str, str] = {}
    for module, parts in raw.modules.items():
        layers = resolved[module]
        assert layers is not None
        change = _change(raw, module, parts)
        sizes = _sizes(raw, module, change, layers, targets)
        for layer, update in zip(layers, _split(raw, module, change, parts.get("magnitude"), sizes), strict=True):
            if layer in owners:
                raise UserError(
                    f"{raw.file}: {module} and {owners[layer]} are both the layer {layer}; --ignore '{module}.*' "
                    "leaves one out"
                )
            owners[layer], updates[layer] = module, update
    return Lora(raw.file, updates, len(raw.modules), raw.metadata, raw.dtype)


def _change(raw: RawLora, module: str, parts: Mapping[str, Tensor]) -> Change:
    """A module's tensors as a change of its weight. Raises: UserError if one is missing or they do not fit."""
    if any(part.startswith("lokr_") for part in parts):
        left, right = (_factors(raw, module, parts, name) for name in ("lokr_w1", "lokr_w2"))
        product = Kronecker(left, right)
        return Kronecker(left, right, _scale(raw, module, parts, product.rank))
    for part, name in (("down", "lora_A (lora_down)"), ("up", "lora_B (lora_up)")):
        if part not in parts:
            raise UserError(f"{raw.file}: {module} has no {name}; the file is incomplete")
    down, up = parts["down"], parts["up"]
    if down.shape[0] != up.shape[1]:
        key = raw.keys[module, "up"]
        raise UserError(f"{raw.file}: {key} is {list(up.shape)}, which does not fit a rank of {down.shape[0]}")
    return LowRank(down, up, _scale(raw, module, parts, len(down)))


def _factors(raw: RawLora, module: str, parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """A factor of a Kronecker product, or the two matrices whose product it is."""
    if name in parts:
        return (parts[name],)
    pair = tuple(parts[key] for key in (f"{name}_a", f"{name}_b") if key in parts)
    if len(pair) != 2 or pair[0].shape[1] != pair[1].shape[0]:
        raise UserError(f"{raw.file}: {module} has no {name}, or not both of its factors; the file is incomplete")
    return pair


def _scale(raw: RawLora, module: str, parts: Mapping[str, Tensor], rank: int | None) -> float:
    """Alpha over rank. Without an alpha anywhere it is 1, as in every program that leaves alpha out.

    Of a Kronecker product of two whole matrices, LyCORIS ignores alpha; peft does not.
    """
    if "alpha" in parts and rank is not None:
        return float(parts["alpha"]) / rank
    if "alpha" in parts or raw.config is None:
        return 1.0
    return raw.config.scale(module)


def _split(raw: RawLora, module: str, whole: Change, magnitude: Tensor | None, sizes: list[int]) -> list[Update]:
    """The updates of the layers that a module is, with so many rows."""
    out, count = whole.shape[0], len(sizes)
    changes = [whole] if count == 1 else list(whole.split(sizes))  # type: ignore[union-attr]
    if magnitude is None:
        return [Update(change) for change in changes]
    if magnitude.ndim == 1 or magnitude.shape[0] == out:
        rows = magnitude.reshape(-1, 1)
        if len(rows) == out:
            return [Update(change, part) for change, part in zip(changes, rows.split(sizes), strict=True)]
    elif magnitude.numel() == whole.shape[1]:
        if count > 1:
            raise UserError(
                f"{raw.file}: {raw.keys[module, 'magnitude']} scales columns of a fused layer, whose parts are layers "
                "of their own here; train DoRA with norms of rows (LyCORIS: wd_on_output), or on separate layers"
            )
        return [Update(changes[0], magnitude.reshape(1, -1))]
    key = raw.keys[module, "magnitude"]
    raise UserError(f"{raw.file}: {key} is {list(magnitude.shape)}; expected a norm for each row or column")


def _sizes(raw: RawLora, module: str, change: Change, layers: list[str], targets: LoraTargets) -> list[int]:
    """The rows of each of a module's layers; equal ones where only the names of the layers are known.

    Raises:
        UserError: the module has another shape than they have together.
    """
    out, columns = change.shape
    shapes = [shape for layer in layers if (shape := targets.shapes[layer]) is not None]
    if len(shapes) < len(layers):
        if out % len(layers):
            raise UserError(f"{raw.file}: {module} has {out} rows, expected {len(layers)} equal parts: another model's")
        return [out // len(layers)] * len(layers)
    sizes = [rows for rows, _ in shapes]
    if (out, columns) != (sum(sizes), shapes[0][1]):
        raise UserError(
            f"{raw.file}: {module} changes a matrix of {out} x {columns}, but {layers[0]} has one of {sum(sizes)} x "
            f"{shapes[0][1]}: a LoRA for another model"
        )
    return sizes


def changes_nothing(lora: Lora) -> bool:
    """Whether all of its updates are zero, as those of an adapter that was never trained."""
    return all(update.magnitude is None and update.change.norm() == 0 for update in lora.updates.values())
