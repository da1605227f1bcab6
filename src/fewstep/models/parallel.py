"""FSDP2 for denoisers."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fewstep.models.denoiser import TransformerDenoiser


def shard_denoiser(denoiser: TransformerDenoiser, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Shard a denoiser's weights over the mesh with FSDP2's ``fully_shard``, block by block: each block is all-gathered
    before its forward and resharded after it.

    Args:
        bf16: weights are all-gathered and used in bf16; shards and gradient reduction stay fp32.
    """
    # rotary frequencies and noise levels must stay fp32, so inputs are not cast
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    for block in denoiser.get_blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # by default the root's weights stay gathered, and would miss later copies into the shards
    fully_shard(denoiser, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(denoiser, "features")
