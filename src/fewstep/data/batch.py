"""Batches of distillation: noise, prompts, and the teacher's states or real latents where a method uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts


@dataclass(frozen=True)
class DistillBatch:
    """
    noise: [B, C, ..., H, W], pure.
    prompts: B of them.
    states: [B, K, C, ..., H, W]: the teacher's states from this noise at the student's levels after the first, the last
        at sigma 0; or K = 1 real latents of these prompts. None for methods that use neither.
    texts: the prompts as text, B of them, for rewards.
    privileged: B prompts that know more than ``prompts``: the real image too. None for methods that use none.
    steps: the number of steps that the student is trained for with this batch; None is any.
    """

    noise: Tensor
    prompts: EncodedPrompts
    states: Tensor | None = None
    texts: Sequence[str] = ()
    privileged: EncodedPrompts | None = None
    steps: int | None = None

    @property
    def real(self) -> Tensor:
        """[B, C, ..., H, W]: latents that count as real."""
        assert self.states is not None
        return self.states[:, -1]

    def __len__(self) -> int:
        return len(self.noise)

    def grouped(self, size: int) -> DistillBatch:
        """Groups of ``size`` samples of one prompt, each with its own noise: the first prompt of every ``size`` rows in
        a row, without states. Of rows that are divided among processes at multiples of ``size``, each gets the groups
        that one process would have there.
        """
        if size == 1:
            return self
        rows = [row - row % size for row in range(len(self))]
        return replace(self, prompts=self.prompts[rows], states=None, texts=[self.texts[row] for row in rows])
