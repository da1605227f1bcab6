"""Z-Image's transformer block on a batch whose samples have equal lengths, which needs no attention mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
from torch import Tensor, nn

from fewstep.core.precision import without_autocast
from fewstep.models.block import TransformerBlock
from fewstep.models.zimage.rope import apply_rope


class ZImageBlock(TransformerBlock):
    """``block(x, freqs, adaln_cond)``: diffusers' ``ZImageTransformerBlock`` with its modules under the same names.

    x is [B, L, D], freqs [L, 1, 2, head_dim / 2]; adaln_cond [B, D'] modulates, and is None in the caption's blocks.
    Returns [B, L, D].
    """

    def __init__(self, block: ZImageTransformerBlock) -> None:
        super().__init__(block_forward)
        for name, module in block.named_children():
            self.add_module(name, module)


def use_fewstep_blocks(transformer: ZImageTransformer2DModel) -> None:
    """Replace the blocks of a diffusers transformer by :class:`ZImageBlock`, in place; the weights are shared."""
    for blocks in (transformer.noise_refiner, transformer.context_refiner, transformer.layers):
        for index, block in enumerate(blocks):
            if not isinstance(block, ZImageBlock):
                blocks[index] = ZImageBlock(block)


def block_forward(block: Any, x: Tensor, freqs: Tensor, adaln_cond: Tensor | None) -> Tensor:
    """The computation of one block; arguments and result as for :class:`ZImageBlock`."""
    if adaln_cond is None:
        x = x + rms_norm(
            self_attention(block.attention, rms_norm(x, block.attention_norm1), freqs), block.attention_norm2
        )
        return x + rms_norm(block.feed_forward(rms_norm(x, block.ffn_norm1)), block.ffn_norm2)
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(adaln_cond).unsqueeze(1).chunk(4, dim=2)
    attention = self_attention(block.attention, rms_norm(x, block.attention_norm1) * (1 + scale_msa), freqs)
    x = x + gate_msa.tanh() * rms_norm(attention, block.attention_norm2)
    feed_forward = block.feed_forward(rms_norm(x, block.ffn_norm1) * (1 + scale_mlp))
    return x + gate_mlp.tanh() * rms_norm(feed_forward, block.ffn_norm2)


def self_attention(attention: Attention, x: Tensor, freqs: Tensor) -> Tensor:
    """Self-attention of one block over all tokens of [B, L, D]."""
    projections = (attention.to_q, attention.to_k, attention.to_v)
    query, key, value = (project(x).unflatten(-1, (attention.heads, -1)) for project in projections)
    query, key = (apply_rope(rms_norm(x, n), freqs) for x, n in ((query, attention.norm_q), (key, attention.norm_k)))
    processor = attention.processor
    mixed = attention_fn(query, key, value, processor._attention_backend, processor._parallel_config)
    return attention.to_out[0](mixed.flatten(2))


def attention_fn(
    query: Tensor, key: Tensor, value: Tensor, backend: str | None = None, parallel_config: Any = None
) -> Tensor:
    """Softmax attention over [B, L, heads, head_dim] by one of diffusers' backends; None is the globally set one.

    Args:
        parallel_config: diffusers', where processes have parts of the tokens.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and parallel_config is None:
        # The backward pass of the CPU's fused bf16 kernel makes a training step take 1.5 times as long.
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return (scores.softmax(dim=-1).type_as(value) @ value).transpose(1, 2)
    return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """RMS norm in the dtype of ``x``; the kernel accumulates in fp32 in any case."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    # Under CUDA's autocast the result would be fp32, and everything up to the next matrix product would take twice the
    # memory and time.
    with without_autocast(x.device):
        return F.rms_norm(x, weight.shape, weight.type_as(x), norm.eps)  # type: ignore[arg-type]
