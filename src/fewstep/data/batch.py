"""What a distillation learns from: noise, prompts, and what the teacher or the data say to them where that is asked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts


@dataclass(frozen=True)
class DistillBatch:
    """
    noise: [B, C, H, W], pure.
    prompts: B of them.
    states: [B, K, C, H, W]: where the teacher's own way from this noise was at the student's levels after the first,
        the last of them an image; or K = 1 real latents of these prompts. None where nobody asks for them.
    """

    noise: Tensor
    prompts: EncodedPrompts
    states: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """[B, C, H, W]: latents that count as real."""
        assert self.states is not None
        return self.states[:, -1]

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: slice) -> DistillBatch:
        return DistillBatch(self.noise[rows], self.prompts[rows], None if self.states is None else self.states[rows])
