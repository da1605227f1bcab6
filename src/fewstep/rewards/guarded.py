"""Scores of a reward in micro-batches, where a sample that cannot be scored costs that sample alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.rewards.protocol import Reward

#: Characters of a prompt and of an error that a message quotes.
QUOTED = 80


@dataclass(frozen=True)
class Problem:
    """Why an image has no score.

    Attributes:
        text: one line with the reward's name and the prompt.
        raised: whether the reward raised an exception, rather than gave an unusable score.
    """

    text: str
    raised: bool

    def __str__(self) -> str:
        return self.text


def guarded_scores(
    reward: Reward, images: Tensor, prompts: Sequence[str], micro_batch: int
) -> tuple[Tensor, dict[int, Problem]]:
    """The scores of all images, and what went wrong where one has none.

    A micro-batch in which something goes wrong is scored image by image, so that the others keep their scores and their
    gradients. With gradient and more than one micro-batch, each is computed again in the backward pass: one at a time
    is in memory. On the meta device (``fewstep plan``) a reward without gradient is not called.

    Args:
        images: [B, 3, H, W] in [0, 1].
        micro_batch: images that are scored at a time.

    Returns:
        Scores float32 [B], NaN where the reward raised or gave another number of scores or one that is not finite; such
        a sample has no gradient. And the problems by row.

    Raises:
        MemoryError, torch.OutOfMemoryError: the reward ran out of memory; no sample is to blame.
    """
    with_gradient = reward.info.differentiable and images.requires_grad and torch.is_grad_enabled()
    recompute = with_gradient and len(images) > micro_batch
    if images.is_meta and not reward.info.differentiable:
        return images.new_empty(len(images), dtype=torch.float32), {}
    parts: list[Tensor] = []
    problems: dict[int, Problem] = {}
    for start in range(0, len(images), micro_batch):
        rows = range(start, min(start + micro_batch, len(images)))
        try:
            parts.append(_scores(reward, images, prompts, rows, with_gradient, recompute))
        except _Unscored:
            for row in rows:
                try:
                    parts.append(_scores(reward, images, prompts, range(row, row + 1), with_gradient, recompute))
                except _Unscored as problem:
                    parts.append(torch.full((1,), math.nan, device=images.device))
                    text = f"reward {reward.name}: {problem}; prompt: {_short(prompts[row])!r}"
                    problems[row] = Problem(text, raised=problem.__cause__ is not None)
    return torch.cat(parts) if parts else images.new_zeros(0, dtype=torch.float32), problems


class _Unscored(Exception):
    """A micro-batch without usable scores."""


def _scores(
    reward: Reward, images: Tensor, prompts: Sequence[str], rows: range, with_gradient: bool, recompute: bool
) -> Tensor:
    """Raises: _Unscored."""
    batch, texts = images[rows.start : rows.stop], list(prompts[rows.start : rows.stop])
    try:
        if recompute:
            scores = checkpoint(reward, batch, texts, use_reentrant=False)
        elif with_gradient:
            scores = reward(batch, texts)
        else:
            with torch.no_grad():
                scores = reward(batch, texts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # a reward may be anyone's code, and run in another process or on another machine
        first = (str(error).strip().splitlines() or [""])[0]
        raise _Unscored(f"{type(error).__name__}: {_short(first)}") from error
    if not isinstance(scores, Tensor):
        raise _Unscored(f"it returned {type(scores).__name__}, no tensor")
    if scores.shape != (len(texts),):
        raise _Unscored(f"it returned the shape {tuple(scores.shape)} for {len(texts)} images")
    if not scores.is_meta and not scores.isfinite().all():
        raise _Unscored(f"its score is {float(scores[~scores.isfinite()][0].detach())}")
    return scores.float().to(images.device)


def _short(text: str) -> str:
    return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."
