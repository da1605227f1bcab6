"""Earlier samples of the student, so that a discriminator in training does not forget them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.conditioning import EncodedPrompts


@dataclass(frozen=True)
class Pairs:
    """Generated and real samples in pairs of one prompt and one noise level.

    Attributes:
        fake: [B, C, ..., H, W], the student's states.
        real: [B, C, ..., H, W], real latents of the same prompts, without noise.
        step: [B], of the student's steps from 0: what level ``fake`` has.
        prompts: B of them.
    """

    fake: Tensor
    real: Tensor
    step: Tensor
    prompts: EncodedPrompts

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, rows: Tensor) -> Pairs:
        return Pairs(self.fake[rows], self.real[rows], self.step[rows], self.prompts[rows])

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.fake.to(device), self.real.to(device), self.step.to(device), self.prompts.to(device))

    @staticmethod
    def concat(parts: list[Pairs]) -> Pairs:
        fake, real, step = (torch.cat([getattr(part, key) for part in parts]) for key in ("fake", "real", "step"))
        return Pairs(fake, real, step, EncodedPrompts.concat([part.prompts for part in parts]))


class Replay:
    """The newest ``capacity`` pairs, on the CPU."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kept: Pairs | None = None

    def __len__(self) -> int:
        return 0 if self.kept is None else len(self.kept)

    def add(self, pairs: Pairs) -> None:
        """Keeps pairs; on several processes, those of all in their order."""
        new = pairs.to("cpu")
        together = new if self.kept is None else Pairs.concat([self.kept, new])
        self.kept = together[torch.arange(max(0, len(together) - self.capacity), len(together))]

    def mix(self, pairs: Pairs, replaced: Tensor, drawn: Tensor) -> Pairs:
        """The pairs, of which those that are to be replaced are kept ones.

        Args:
            replaced: bool [B].
            drawn: [B] in [0, 1), uniform: which of the kept ones.
        """
        if self.kept is None or not len(self.kept):
            return pairs
        chosen = (drawn.cpu() * len(self.kept)).long()
        both = Pairs.concat([pairs, self.kept[chosen].to(pairs.fake.device)])
        rows = torch.arange(len(pairs))
        return both[torch.where(replaced.cpu(), rows + len(pairs), rows)]

    def state_dict(self) -> dict[str, Tensor]:
        if self.kept is None:
            return {}
        kept = self.kept
        tensors = {"fake": kept.fake, "real": kept.real, "step": kept.step}
        return tensors | {"features": kept.prompts.features, "lengths": kept.prompts.lengths}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave."""
        if not state:
            self.kept = None
            return
        kept = {key: value.cpu().clone() for key, value in state.items()}
        prompts = EncodedPrompts(kept["features"], kept["lengths"])
        self.kept = Pairs(kept["fake"], kept["real"], kept["step"], prompts)
