"""Blocks of diffusers' transformers, with diffusers' own arithmetic, as :class:`TransformerBlock`."""

from __future__ import annotations

from torch import nn

from fewstep.models.block import TransformerBlock


class DiffusersBlock(TransformerBlock):
    """Computes what a block of diffusers computes, with its settings and its modules under the same names.

    It is called with the arguments of the block's ``forward`` in their order.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(type(block).forward)
        for name in vars(block).keys() - vars(nn.Module()).keys():
            setattr(self, name, getattr(block, name))
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in block.named_children():
            self.add_module(name, module)


def replace_blocks(*lists: nn.ModuleList) -> None:
    """Replace diffusers' blocks by :class:`DiffusersBlock`, in place; the weights are shared."""
    for blocks in lists:
        for index, block in enumerate(blocks):
            if not isinstance(block, DiffusersBlock):
                blocks[index] = DiffusersBlock(block)
