"""Transformer blocks as modules that are checkpointed, compiled, offloaded and sharded, in any order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.models.adapters import capture_adapter_state

#: ``compute(block, *inputs)``: a block's arithmetic as a function of the block; its result is a tensor or several.
ComputeFn = Callable[..., Any]

#: A block -> a context manager around its computation.
BlockContext = Callable[[nn.Module], AbstractContextManager[None]]


class TransformerBlock(nn.Module):
    """A transformer block, called as a module: hooks and FSDP2 act on the call, everything else inside of it.

    Args:
        compute: the block's arithmetic. All blocks share one function, so that one compiled version serves all of them.

    Attributes:
        compute: replaced by its compiled version by ``TransformerDenoiser.compile_repeated_blocks``.
        gradient_checkpointing: whether the forward pass keeps only the inputs, and the backward pass recomputes the
            block from them with the LoRA adapters that were active.
        offloaded: whether ``offload.offload_blocks`` keeps its weights in the CPU's memory.
        contexts: entered around ``compute``, in the forward pass and in the recomputation.
    """

    def __init__(self, compute: ComputeFn) -> None:
        super().__init__()
        self.compute = compute
        self.gradient_checkpointing = self.offloaded = False
        self.contexts: list[BlockContext] = []

    def forward(self, *inputs: Tensor | None) -> Any:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self._compute(*inputs)
        adapters = capture_adapter_state(self)
        return checkpoint(
            self._compute,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), adapters()),
            preserve_rng_state=False,  # blocks draw no random numbers
        )

    def _compute(self, *inputs: Tensor | None) -> Any:
        if not self.contexts:
            return self.compute(self, *inputs)
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context(self))
            return self.compute(self, *inputs)
