"""Batches of distillation: noise, prompts, and the teacher's states or real latents where a method uses them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts


@dataclass(frozen=True)
class DistillBatch:
    """
    noise: [B, C, ..., H, W], pure.
    prompts: B of them.
    states: [B, K, C, ..., H, W]: the teacher's states from this noise at the student's levels after the first, the last
        at sigma 0; or K = 1 real latents of these prompts. None for methods that use neither.
    """

    noise: Tensor
    prompts: EncodedPrompts
    states: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """[B, C, ..., H, W]: latents that count as real."""
        assert self.states is not None
        return self.states[:, -1]

    def __len__(self) -> int:
        return len(self.noise)
