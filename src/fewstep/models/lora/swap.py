"""LoRA files on a loaded model, in place of others, without reading the model again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.models.lora.merge import Weighted, merge_


class LoraSwap:
    """Merges adapters into a transformer's weights as loading a model with them does, and takes them out again to the
    last bit.

    What merging changes is kept as it was, in the CPU's memory: a copy of every weight matrix that an adapter changed
    so far.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self._base: dict[str, Tensor] = {}
        self._changed: set[str] = set()

    @torch.no_grad()
    def set(self, loras: Weighted) -> None:
        """Have these adapters, and no others, in the weights. An error leaves them out at the next call.

        Raises:
            ValueError: the weights are in fp8.
        """
        for name in self._changed:
            self._weight(name).copy_(self._base[name])
        self._changed = {name for lora, strength in loras if strength for name in lora.updates}
        for name in self._changed - self._base.keys():
            self._base[name] = self._weight(name).detach().to("cpu", copy=True)
        merge_(self.transformer, loras)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self.transformer.get_submodule(name).weight  # type: ignore[assignment]
        return weight
