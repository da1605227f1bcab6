"""Group-relative policy optimization (GRPO) on stochastic steps of a few-step student (RTDMD, arXiv 2605.26108)."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``-mean min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A)``, a scalar (PPO, arXiv 1707.06347, eq. 7).

    Where all advantages are 0 its gradient is exactly 0.

    Args:
        log_prob: [B], of the samples under the present student, with gradient; a mean over dimensions, in fp32.
        old_log_prob: [B], under the student that made them.
        advantages: [B].
        clip: the ratio's largest distance from 1; small, because the log-probabilities are means over dimensions.
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def gaussian_kl(mean: Tensor, reference: Tensor, std: float) -> Tensor:
    """The KL divergence of two Gaussians of one deviation, as the mean over dimensions: [B].

    Args:
        mean, reference: [B, C, ..., H, W].
        std: above 0.
    """
    return (mean.float() - reference.float()).square().flatten(1).mean(dim=1) / (2 * std**2)
