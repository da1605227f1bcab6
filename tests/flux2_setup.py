"""A FLUX.2 [klein] of random weights: all components of ``Flux2KleinPipeline``, 64 px."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from language_models import micro_tokenizer, random_model


def save_flux2(folder: Path, is_distilled: bool = False, heads: int = 3, **scheduler: object) -> Path:
    """Written by diffusers. The text encoder has as many layers as the released one's features are taken from."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=heads,
        joint_attention_dim=96, timestep_guidance_channels=32, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    settings = {"use_dynamic_shifting": True, "time_shift_type": "exponential", "shift": 3.0, **scheduler}
    text_encoder = random_model(num_hidden_layers=27)
    pipeline = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(**settings), vae, text_encoder, micro_tokenizer(), transformer, is_distilled
    )
    pipeline.save_pretrained(folder)
    return folder
