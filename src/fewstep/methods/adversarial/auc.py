"""How well scores tell real from generated samples: the area under the ROC curve, with a bound from below.

The area is the probability that a real sample scores higher than a generated one, ties counted half (Mann-Whitney);
0.5 is chance. A percentile bootstrap over pairs of one prompt and level gives the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 400  # of the bootstrap


def auc(real: Tensor, fake: Tensor) -> float:
    """The area of scores [N] and [M], both of at least one."""
    return float(_wins(real, fake).mean())


def auc_lower_bound(real: Tensor, fake: Tensor, confidence: float) -> float:
    """The value below which the area of bootstrap samples is in a share ``1 - confidence`` of them.

    A pair is drawn whole. The draws are the same in each call, so the result is a function of the scores.

    Args:
        real, fake: [N], in pairs.
        confidence: in (0, 1), of the bound on one side.
    """
    count = len(real)
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    areas = ((times @ _wins(real, fake)) * times).sum(dim=1) / count**2
    return float(areas.quantile(1 - confidence))


def _wins(real: Tensor, fake: Tensor) -> Tensor:
    """float64 [N, M]: 1 where the real one scores higher, 0.5 where both are equal."""
    difference = real.double().cpu()[:, None] - fake.double().cpu()
    return (difference > 0).double() + 0.5 * (difference == 0).double()
