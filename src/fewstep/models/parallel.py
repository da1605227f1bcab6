"""FSDP2 for denoisers."""

from __future__ import annotations

import types

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fewstep.models.zimage.denoiser import ZImageDenoiser, get_blocks


def shard_denoiser(denoiser: ZImageDenoiser, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Shard a denoiser's weights over the mesh, block by block (FSDP2's `fully_shard`): each block is gathered when it
    speaks, and let go after.

    Args:
        bf16: weights are sent, and speak, in bf16; what each holds, and gradients on their way, stay as they are.
    """
    model = denoiser.transformer
    # rotations and noise levels must stay fp32, so what goes in is not cast
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    compute = denoiser.run_block
    for block in get_blocks(model):
        # FSDP gathers around a module's own forward, so the block must be called as one
        block.forward = types.MethodType(compute, block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    denoiser.run_block = lambda block, x, rotations, condition: block(x, rotations, condition)
    # by default the outermost weights stay gathered, and would not see it when others are copied into the shards
    fully_shard(denoiser, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(denoiser, "features")
