"""The weight at which a reward pulls a student's samples as hard as distribution matching does.

DMDR's authors give no constant but a rule: the reward's term is about as large as DMD's when it starts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.rewards.moments import Reduce


def gradient_norm(gradient: Tensor) -> Tensor:
    """The mean over samples of the norm of each sample's own gradient, a scalar.

    Args:
        gradient: [B, C, ..., H, W], of a loss that is a mean over the B samples.
    """
    return len(gradient) * torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1).mean()


class Balance:
    """A factor that brings one gradient to ``ratio`` times another's norm, measured over the first updates, then fixed.

    During the measurement the factor is that of the updates so far. An update in which the gradient to be scaled is
    zero, as where every score has reached its margin, measures nothing.

    Args:
        ratio: the norm of the scaled gradient over that of the reference.
        updates: how many are measured. One would depend on the anchor that it happens to draw.
        reduce: sums over processes.
    """

    def __init__(self, ratio: float, updates: int, reduce: Reduce = lambda tensor: tensor) -> None:
        self.ratio, self.updates, self.reduce = ratio, updates, reduce
        self.measured = 0
        self.scaled = self.reference = 0.0  # sums of norms

    @property
    def factor(self) -> float:
        """1 before the first measurement."""
        return self.ratio * self.reference / self.scaled if self.scaled else 1.0

    def measure(self, gradient: Tensor, reference: Tensor) -> None:
        """Takes the norms of one update into account, while there are updates to be measured.

        Args:
            gradient, reference: [B, C, ..., H, W], of losses that are means over samples.
        """
        if self.measured >= self.updates or gradient.is_meta:  # a dry run has shapes alone
            return
        norms = torch.stack([gradient_norm(gradient), gradient_norm(reference)]).double()
        scaled, against = self.reduce(norms).tolist()
        if scaled > 0:
            self.measured += 1
            self.scaled, self.reference = self.scaled + scaled, self.reference + against

    def state(self) -> Tensor:
        """float64 [3]."""
        return torch.tensor([self.measured, self.scaled, self.reference], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restores what :meth:`state` returned."""
        measured, self.scaled, self.reference = state.double().tolist()
        self.measured = int(measured)
