"""Block offloading: a transformer's blocks stay in the CPU's memory and are on the device only while they compute.

For GPUs that the weights do not fit on. Slow: every forward pass transfers all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.adapters import is_adapter_key
from fewstep.models.block import TransformerBlock
from fewstep.models.denoiser import TransformerDenoiser


def offload_blocks(denoiser: TransformerDenoiser, device: torch.device | str) -> None:
    """Make the denoiser compute on ``device``, which keeps only the weights outside of the blocks, and LoRA adapters.
    Blocks may be compiled, before or after. In training they are to be checkpointed: else the copies of all blocks stay
    on the device until the backward pass.

    Raises:
        UserError: they are offloaded already.
    """
    blocks = denoiser.get_blocks()
    if has_offloaded_blocks(denoiser):
        raise UserError("offload: the blocks of this model are offloaded already; load it again to change the device")
    inside = {id(module) for block in blocks for module in block.modules()}
    adapters = {id(parameter) for key, parameter in denoiser.named_parameters() if is_adapter_key(key)}

    def at_home(tensor: Tensor) -> Tensor:
        return tensor.to(device) if id(tensor) in adapters else _pinned(tensor, device)

    to_device: Callable[[Tensor], Tensor] = partial(Tensor.to, device=device)  # type: ignore[call-overload]
    for module in denoiser.modules():
        module._apply(at_home if id(module) in inside else to_device, recurse=False)
    for block in blocks:
        block.contexts.append(partial(on_device, device=device))
        block.offloaded = True


def has_offloaded_blocks(model: nn.Module) -> bool:
    """Whether ``offload_blocks`` was called on a transformer, or on a denoiser around it."""
    return any(isinstance(module, TransformerBlock) and module.offloaded for module in model.modules())


@contextmanager
def on_device(block: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Inside, the block's weights are copies on the device, through which gradients reach the weights."""
    homes = [(module, dict(module._parameters), dict(module._buffers)) for module in block.modules()]
    for module, parameters, buffers in homes:
        for tensors, own in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    own[name] = tensor.to(device, non_blocking=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, parameters, buffers in homes:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the CPU, in page-locked memory where the device is a GPU, so that copies to it are asynchronous."""
    on_cpu = tensor.cpu()
    return on_cpu.pin_memory() if torch.device(device).type == "cuda" else on_cpu
