"""The discriminator D(x_sigma, sigma, prompt): heads on several blocks of the frozen teacher, token by token.

The teacher's features depend on the noise level and the prompt already; the heads are told the level again, because
what separates the two distributions changes with it. Layout and sizes are ours.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

FREQUENCIES = 8  # of the embedding of sigma


def _ascending(depths: list[float]) -> list[float]:
    if depths != sorted(set(depths)):
        raise ValueError(f"{depths}: give ascending shares")
    return depths


#: Shares of the teacher's layers after which there is a head.
Depths = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1), AfterValidator(_ascending)]


class DiscriminatorHeads(nn.Module):
    """Features [B, L, heads * D] of noisy images at sigma [B] -> logits [B, heads, L]; positive is real.

    Args:
        width: D, of the features of one block.
        heads: blocks, in the order in which their features are concatenated.
    """

    def __init__(self, width: int, heads: int, hidden: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(width, hidden) for _ in range(heads))

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        parts = features.chunk(len(self.heads), dim=-1)
        return torch.stack([head(part, sigma) for head, part in zip(self.heads, parts, strict=True)], dim=1)


class TokenHead(nn.Module):
    """Features [B, L, D] at sigma [B] -> a logit for each token, [B, L]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.level = nn.Linear(width, hidden), nn.Linear(2 * FREQUENCIES, hidden)
        self.middle, self.out = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        angle = math.pi * sigma.float()[:, None] * torch.arange(1, FREQUENCIES + 1, device=sigma.device)
        level = self.level(torch.cat([angle.sin(), angle.cos()], dim=-1))
        hidden = nn.functional.silu(self.inner(self.norm(features)) + level[:, None])
        return self.out(nn.functional.silu(self.middle(hidden))).squeeze(-1)


def score_of(logits: Tensor) -> Tensor:
    """One logit for each sample, [B] in fp32, without gradient: the mean over heads and tokens [B, heads, L]."""
    return logits.detach().float().mean(dim=(1, 2))
