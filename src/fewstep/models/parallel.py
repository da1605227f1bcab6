"""FSDP2 for denoisers."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from fewstep.models.adapters import is_adapter_key
from fewstep.models.denoiser import TransformerDenoiser


def shard_denoiser(denoiser: TransformerDenoiser, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Shard a denoiser's weights over the mesh with FSDP2's ``fully_shard``, block by block: each block is all-gathered
    before its forward and resharded after it. LoRA adapters are not sharded: every process has them whole, and their
    gradients are averaged by ``DistContext.sync_unsharded_grads``. So frozen weights may have any dtype.

    Args:
        bf16: weights in fp32 are all-gathered and used in bf16; shards and gradient reduction stay fp32.
    """
    adapters = {parameter for key, parameter in denoiser.named_parameters() if is_adapter_key(key)}
    casts = bf16 and all(p.dtype == torch.float32 for p in denoiser.parameters() if p not in adapters)
    # rotary frequencies and noise levels must stay fp32, so inputs are not cast
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if casts
        else MixedPrecisionPolicy()
    )
    for block in denoiser.get_blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=adapters)
    # by default the root's weights stay gathered, and would miss later copies into the shards
    fully_shard(denoiser, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=adapters)
    register_fsdp_forward_method(denoiser, "features")
