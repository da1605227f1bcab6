"""Updates of separate layers as one of a fused layer, where that is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fewstep.errors import UserError
from fewstep.models.lora.targets import LoraTargets
from fewstep.models.lora.weights import Kronecker, LowRank, Rows, Update


def fuse(updates: Mapping[str, Update], targets: LoraTargets) -> dict[str, Update]:
    """Updates by diffusers' names -> by the names of the family's single files.

    Raises:
        UserError: the parts of a fused layer have no common form.
    """
    fused: dict[str, Update] = {}
    groups: dict[str, dict[int, Update]] = {}
    counts: dict[str, int] = {}
    for name, update in updates.items():
        other, part = targets.file_name(name)
        if part is None:
            fused[other] = update
        else:
            groups.setdefault(other, {})[part[0]] = update
            counts[other] = part[1]
    for other, parts in groups.items():
        fused[other] = _fused(other, parts, _sizes(other, parts, counts[other], targets))
    return fused


def _sizes(name: str, parts: Mapping[int, Update], count: int, targets: LoraTargets) -> list[int]:
    """The rows of each part of a fused layer; equal ones where only the names of the layers are known."""
    shapes = [targets.shapes[layer] for layer in targets.resolve(name) or []]
    known = [shape[0] for shape in shapes if shape is not None]
    return known if len(known) == count else [next(iter(parts.values())).change.shape[0]] * count


def _fused(name: str, parts: Mapping[int, Update], sizes: Sequence[int]) -> Update:
    count = len(sizes)
    changes = [parts[index].change for index in sorted(parts)]
    magnitudes = [parts[index].magnitude for index in sorted(parts)]
    given = [magnitude for magnitude in magnitudes if magnitude is not None]
    rows = [magnitude for magnitude in given if magnitude.shape[1] == 1]
    if given and len(rows) < count:
        raise UserError(
            f"{name}: DoRA of some of its parts, or of columns, has no form with fused names; use diffusers"
        )
    magnitude = torch.cat(rows) if rows else None
    low_rank = {index: part.change for index, part in parts.items() if isinstance(part.change, LowRank)}
    if len(low_rank) == len(parts):
        return Update(_fused_low_rank(low_rank, sizes), magnitude)
    products = [change for change in changes if isinstance(change, Kronecker)]
    if len(products) == count and all(_continue(products[0], other) for other in products[1:]):
        left = torch.cat([product.left[0] for product in products])
        return Update(replace(products[0], left=(left, *products[0].left[1:])), magnitude)
    views = [change for change in changes if isinstance(change, Rows)]
    if len(views) == count and len({id(view.whole) for view in views}) == 1:
        return Update(views[0].whole, magnitude)
    raise UserError(
        f"{name}: LoKr of separate layers has no exact form with fused names; write diffusers, or turn it into LoRA: "
        "fewstep lora resize"
    )


def _fused_low_rank(parts: Mapping[int, LowRank], sizes: Sequence[int]) -> LowRank:
    """One ``down`` where all parts share it, else a block-diagonal ``up`` of the sum of their ranks."""
    changes = [parts[index] for index in sorted(parts)]
    first = changes[0]
    alike = all(other.scale == first.scale for other in changes)
    if len(parts) == len(sizes) and alike and all(torch.equal(other.down, first.down) for other in changes):
        return LowRank(first.down, torch.cat([change.up for change in changes]), first.scale)
    up, column = torch.zeros(sum(sizes), sum(change.rank for change in changes)), 0
    for index, change in sorted(parts.items()):
        start = sum(sizes[:index])
        block = change.up if alike else change.scale * change.up
        up[start : start + sizes[index], column : column + change.rank] = block
        column += change.rank
    return LowRank(torch.cat([change.down for change in changes]), up, first.scale if alike else 1.0)


def _continue(one: Kronecker, other: Kronecker) -> bool:
    """Whether two products differ in the first matrix of the left factor alone."""
    pairs = zip((*one.left[1:], *one.right), (*other.left[1:], *other.right), strict=False)
    same_form = len(one.left) == len(other.left) and len(one.right) == len(other.right) and one.scale == other.scale
    return same_form and all(torch.equal(a, b) for a, b in pairs)
