"""Several adapters as one: concatenated, which is exact, or their weighted sum at a chosen rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fewstep.errors import UserError
from fewstep.models.lora.weights import Lora, LowRank, Update


def concatenate(loras: Sequence[tuple[Lora, float]]) -> dict[str, Update]:
    """One adapter whose effect is that of all of them at their strengths: ranks add up, nothing is lost.

    Raises:
        UserError: DoRA, whose effect is no sum; or LoKr, which has no low rank.
    """
    parts: dict[str, list[LowRank]] = {}
    for lora, strength in loras:
        for name, update in lora.updates.items():
            change = update.change
            if update.magnitude is not None:
                raise UserError(f"{lora.file}: {name} has DoRA, whose effects do not add up; merge it into the model")
            if not isinstance(change, LowRank):
                raise UserError(f"{lora.file}: {name} is LoKr; turn it into LoRA first: fewstep lora resize")
            scaled = LowRank(change.down, strength * change.scale * change.up)
            parts.setdefault(name, []).append(scaled)
    return {name: Update(_joined(changes)) for name, changes in parts.items()}


def _joined(changes: Sequence[LowRank]) -> LowRank:
    return LowRank(torch.cat([one.down for one in changes]), torch.cat([one.up for one in changes], dim=1))
