"""Optimizers and learning rates, from their settings."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewstep.config.sections import OptimSettings
from fewstep.errors import UserError


def make_optimizer(parameters: list[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """AdamW over `parameters`, in their order: fused (a third of the time on a CPU), or torchao's with 8-bit moments
    (arXiv 2110.02861).

    Raises: UserError for adamw8bit if torchao is not installed.
    """
    common: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, fused=True, **common)
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("optim.*.optimizer=adamw8bit needs torchao; pip install 'fewstep[lowbit]'") from None
    return AdamW8bit(parameters, lr=settings.lr, **common)


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # compiled into torchao's step
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer create its state before its first step, by a step with learning rate 0 and zero gradients."""
    set_lr(optimizer, 0.0)
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()


def tensor_leaves(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors of an optimizer state tensor, by name suffix: itself, or its 8-bit codes and scales."""
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        return {"": value}
    names, _ = value.__tensor_flatten__()
    return {f"/{name}": getattr(value, name) for name in names}


def learning_rate(settings: OptimSettings, step: int, steps: int) -> float:
    """The learning rate of step number `step` in 1..steps: warm-up from lr / warmup_steps to lr, then the decay.

    The last step has lr * min_lr_ratio, unless the decay is constant.
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
    }[settings.lr_schedule]
    floor = settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * shape)
