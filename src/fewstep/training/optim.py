"""Optimizers and learning rates, from their settings."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fewstep.config.sections import OptimSettings
from fewstep.core.compiler import check_compiler
from fewstep.errors import UserError


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of a network's blocks, AdamW for all else, as one optimizer with one learning rate.

    Muon's updates are scaled to the root mean square of AdamW's (arXiv 2502.16982, section 2.2).

    Args:
        weights: trained parameters by name; those of a block have its number in their name ("layers.0.").
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: OptimSettings) -> None:
        matrices = [p for name, p in weights.items() if p.ndim == 2 and any(part.isdigit() for part in name.split("."))]
        chosen = {id(p) for p in matrices}
        common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        others = [p for p in weights.values() if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
        if others:
            adamw = torch.optim.AdamW(others, betas=settings.betas, eps=settings.eps, fused=True, **common)
            self.parts.append(adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def check_optimizer(part: str, settings: OptimSettings, processes: int) -> None:
    """Raises: UserError if the optimizer of a trainable part does not work with so many processes."""
    if settings.optimizer != "adamw" and processes > 1:
        raise UserError(f"optim.{part}.optimizer={settings.optimizer} works with one process only; use adamw")


def make_optimizer(weights: Mapping[str, nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of trained parameters by name: AdamW, fused (a third of the time on a CPU), or torchao's with 8-bit
    moments (arXiv 2110.02861); or Muon with AdamW.

    Raises: UserError for adamw8bit if torchao is not installed, or its compiler.
    """
    parameters = list(weights.values())
    common: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, fused=True, **common)
    if settings.optimizer == "muon":
        return MuonWithAdamW(weights, settings)
    check_compiler(parameters[0].device, "optim.*.optimizer=adamw8bit")
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("optim.*.optimizer=adamw8bit needs torchao; pip install 'fewstep[lowbit]'") from None
    return AdamW8bit(parameters, lr=settings.lr, **common)


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
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
