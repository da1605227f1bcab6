"""Optimizers and learning rates, from their settings."""

import math

import torch
from torch import nn

from fewstep.recipes.schema import OptimSettings


def adamw(parameters: list[nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over `parameters`, in their order; fused, which took a third of the time on a CPU."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """The learning rate of step number `step` in 1..steps: warm-up from lr / warmup_steps to lr, then the decay.

    The last step has lr * final_lr_ratio, unless the decay is constant.
    """
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    # Progress is 0 at the last step of the warm-up (step 1 if there is none) and 1 at the last step of all.
    start = max(settings.warmup_steps, 1)
    progress = min(1.0, (step - start) / max(1, steps - start))
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.decay]
    floor = settings.final_lr_ratio
    return settings.lr * (floor + (1 - floor) * shape)
