"""The transformer's blocks in the CPU's memory, each on the device only while it speaks: for generation on cards that
the weights do not fit on. Slow: all weights travel at every forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.models.zimage.denoiser import ZImageDenoiser, get_blocks


def offload_blocks(denoiser: ZImageDenoiser, device: torch.device | str) -> None:
    """From here on the denoiser computes on ``device``, where only what lies outside of its blocks stays."""
    model, compute = denoiser.transformer, denoiser.run_block
    inside = {id(module) for block in get_blocks(model) for module in block.modules()}
    for module in model.modules():
        _replace(module, (lambda t: _pinned(t, device)) if id(module) in inside else (lambda t: t.to(device)))

    def run(block: nn.Module, x: Tensor, rotations: Tensor, condition: Tensor | None) -> Tensor:
        with on_device(block, device):
            return compute(block, x, rotations, condition)  # type: ignore[arg-type]

    denoiser.run_block = run  # type: ignore[assignment]


@contextmanager
def on_device(block: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Inside, a block's weights are on the device; what is there is let go after, for they have not changed."""
    homes = [(module, dict(module._parameters), dict(module._buffers)) for module in block.modules()]
    for module, _, _ in homes:
        _replace(module, lambda tensor: tensor.to(device, non_blocking=True))
    try:
        yield
    finally:
        for module, parameters, buffers in homes:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _replace(module: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Moves a module's own weights, not those of the modules in it; its old ones stay as they are."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(move(parameter.data), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = move(buffer)


def _pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """In memory that a GPU can read by itself, where there is one."""
    here = tensor.cpu()
    return here.pin_memory() if torch.device(device).type == "cuda" else here
