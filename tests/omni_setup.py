"""A Z-Image-Omni of random weights: all components of ``ZImageOmniPipeline``, written by diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageOmniPipeline, ZImageTransformer2DModel
from language_models import micro_tokenizer, random_model
from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

FEATURES = 16  # of SigLIP2


def save_omni(folder: Path, siglip_feat_dim: int | None = FEATURES, **scheduler: object) -> Path:
    """In fp32."""
    torch.manual_seed(0)
    text_encoder = random_model()
    transformer = ZImageTransformer2DModel(
        dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=text_encoder.config.hidden_size,
        siglip_feat_dim=siglip_feat_dim, axes_dims=[8, 8, 8], axes_lens=[1024, 16, 16],
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        sample_size=64, scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(10)  # images of many colors, which tell small differences
    siglip = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=FEATURES, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_patches=16
        )
    )
    settings = {"shift": 3.0, **scheduler}
    ZImageOmniPipeline(
        FlowMatchEulerDiscreteScheduler(**settings), vae, text_encoder, micro_tokenizer(), transformer, siglip,
        Siglip2ImageProcessor(max_num_patches=16),
    ).save_pretrained(folder)  # fmt: skip
    return folder
