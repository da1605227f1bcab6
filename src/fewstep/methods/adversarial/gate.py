"""When a discriminator may be a reward: at the steps where it can tell, and no more once it could not for long.

Policy gradients divide scores by their deviation. Where a discriminator cannot tell the student's samples from real
ones its scores are noise, which that division turns into updates of full size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fewstep.methods.adversarial.auc import auc, auc_lower_bound
from fewstep.methods.adversarial.conditions import auc_by_condition


class Gate:
    """For each of the student's steps, scores of held-out pairs, their AUC, and whether its bound is high enough.

    Args:
        steps: of the student.
        threshold: that the bound must exceed.
        confidence: of the bound.
        window: pairs that are kept for each step, the newest.
        least: pairs of a step without which it stays closed.
        patience: updates in a row with no step open, after one was open, from which on the gate is closed for good.
    """

    def __init__(
        self,
        steps: int,
        threshold: float = 0.65,
        confidence: float = 0.95,
        window: int = 128,
        least: int = 32,
        patience: int = 50,
    ) -> None:
        self.threshold, self.confidence, self.window = threshold, confidence, window
        self.least, self.patience = least, patience
        self.pairs = [torch.zeros(0, 3, dtype=torch.float64) for _ in range(steps)]
        self.areas: list[float | None] = [None] * steps
        self.bounds: list[float | None] = [None] * steps
        self.opened_at: int | None = None
        self.closed_for = 0

    def add(self, step: Tensor, real: Tensor, fake: Tensor, condition: Tensor | None = None) -> None:
        """Takes scores of held-out pairs, [N] each; ``step`` counts the student's steps from 0.

        Args:
            condition: of their prompts, indices in ``conditions.CONDITIONS``; None is the first.
        """
        condition = torch.zeros_like(real) if condition is None else condition.to(real)
        pairs = torch.stack([real, fake, condition], dim=1).double().cpu()
        for index in range(len(self.pairs)):
            self.pairs[index] = torch.cat([self.pairs[index], pairs[step.cpu() == index]])[-self.window :]

    def update(self, step: int, started: bool = True) -> None:
        """Measures the areas anew; once in a step of the training, which ``step`` counts.

        Args:
            started: whether it may open yet.
        """
        for index, pairs in enumerate(self.pairs):
            if len(pairs) >= self.least:
                self.areas[index] = auc(pairs[:, 0], pairs[:, 1])
                self.bounds[index] = auc_lower_bound(pairs[:, 0], pairs[:, 1], self.confidence)
        if started and any(self.sees):
            self.opened_at = step if self.opened_at is None else self.opened_at
        if self.opened_at is not None and not self.stopped:
            self.closed_for = 0 if any(self.sees) else self.closed_for + 1

    @property
    def sees(self) -> list[bool]:
        """Whether the bound exceeds the threshold, by step."""
        return [bound is not None and bound > self.threshold for bound in self.bounds]

    @property
    def stopped(self) -> bool:
        """Whether it is closed for good."""
        return self.closed_for >= self.patience

    @property
    def open(self) -> list[bool]:
        """Whether a step's scores may be used."""
        return [sees and not self.stopped for sees in self.sees]

    def metrics(self) -> dict[str, Tensor]:
        """By step from 1 ``auc_1`` and its bound ``auc_low_1``, once there are enough pairs; the least as ``auc``; by
        condition ``auc_latin`` and so on, the mean over steps."""
        named = {"auc": self.areas, "auc_low": self.bounds}
        found: dict[str, float] = {}
        for name, values in named.items():
            known = {f"{name}_{index + 1}": value for index, value in enumerate(values) if value is not None}
            found |= known | ({name: min(known.values())} if known else {})
        found |= {f"auc_{name}": area for name, area in auc_by_condition(self.pairs).items()}
        return {name: torch.tensor(value) for name, value in found.items()}

    def state_dict(self) -> dict[str, Tensor]:
        counters = [-1 if self.opened_at is None else self.opened_at, self.closed_for]
        measured = [[-1.0 if value is None else value for value in each] for each in (self.areas, self.bounds)]
        return {
            "counters": torch.tensor(counters),
            "measured": torch.tensor(measured, dtype=torch.float64),
            **{f"pairs_{index}": pairs.clone() for index, pairs in enumerate(self.pairs)},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` gave."""
        opened, self.closed_for = state["counters"].tolist()
        self.opened_at = None if opened < 0 else opened
        self.areas, self.bounds = ([None if v < 0 else v for v in each] for each in state["measured"].tolist())
        self.pairs = [state[f"pairs_{index}"].clone() for index in range(len(self.pairs))]
