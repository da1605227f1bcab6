"""Context parallelism (Ulysses, arXiv 2309.14509): the processes of a group hold parts of each sample's tokens.

Between :meth:`ContextParallel.split` and :meth:`ContextParallel.join` each process computes its own tokens; attention,
which is diffusers', exchanges them for all tokens of its own heads. Weights are used by all processes. Their gradients
are averaged over all processes afterwards, where those of a group must be summed: the gradient of a joined tensor is
therefore multiplied by the group's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fewstep.errors import UserError

GROUP = "ulysses"  # diffusers' name of the mesh's dimension


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share each sample.

    Attributes:
        mesh: has the dimensions "ring", of size 1, and "ulysses".
    """

    mesh: DeviceMesh

    @property
    def size(self) -> int:
        return int(self.mesh[GROUP].size())

    def split(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """This process's part of tokens that all processes have.

        Raises:
            UserError: they cannot be divided evenly.
        """
        if tokens.shape[dim] % self.size:
            raise UserError(
                f"models.context_parallel {self.size} does not divide the {tokens.shape[dim]} tokens of a sample"
            )
        part: Tensor = _Split.apply(tokens, dim, self.mesh[GROUP].get_group())  # type: ignore[no-untyped-call]
        return part

    def join(self, part: Tensor, dim: int = 1) -> Tensor:
        """All processes' parts, on each of them."""
        tokens: Tensor = _Join.apply(part, dim, self.mesh[GROUP].get_group())  # type: ignore[no-untyped-call]
        return tokens

    def apply(self, modules: nn.Module) -> None:
        """Let the attention in modules of a diffusers transformer exchange tokens for heads, whose number is a multiple
        of ``size``."""
        from diffusers import ContextParallelConfig
        from diffusers.models._modeling_parallel import ParallelConfig
        from diffusers.models.attention import AttentionModuleMixin
        from diffusers.models.attention_processor import Attention

        config = ParallelConfig(ContextParallelConfig(ulysses_degree=self.size))
        # enable_parallelism also divides the transformer's inputs, which its denoiser does here, and needs a GPU
        device = torch.device(self.mesh.device_type)
        config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=self.mesh)
        for module in modules.modules():
            if isinstance(module, Attention | AttentionModuleMixin):
                # a processor without this attribute would ignore it: each process would attend to its own tokens alone
                if not hasattr(module.processor, "_parallel_config"):
                    raise TypeError(f"{type(module.processor).__name__} cannot exchange tokens between processes")
                module.processor._parallel_config = config


def _all_parts(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _own_part(tokens: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return tokens.chunk(dist.get_world_size(group), dim=dim)[dist.get_rank(group)]


class _Split(torch.autograd.Function):
    """The gradient of what all processes have: their parts' gradients, without the factor of :class:`_Join`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own_part(tokens, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        whole = _all_parts(gradients[0], ctx.dim, ctx.group)
        return whole / dist.get_world_size(ctx.group), None, None


class _Join(torch.autograd.Function):
    """The gradient of a part, times the number of parts."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_parts(part, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _own_part(gradients[0], ctx.dim, ctx.group) * dist.get_world_size(ctx.group), None, None
