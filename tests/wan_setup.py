"""A Wan 2.1 of random weights: all components of ``WanPipeline``, 64 px."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from sd3_setup import t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel


def save_wan(folder: Path) -> Path:
    """Written by diffusers."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip
    WanPipeline(t5_tokenizer(), text, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer).save_pretrained(
        folder
    )
    return folder
