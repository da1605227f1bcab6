"""Latents to images for rewards, with gradient and bounded memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fewstep.models.pipeline import TextToImagePipeline


def decode_images(pipeline: TextToImagePipeline, latents: Tensor, micro_batch: int = 1) -> Tensor:
    """Latents -> images float32 [B, 3, H, W] in [0, 1], with gradient to the latents if they have one.

    With gradient, activations are not kept: each micro-batch is decoded again in the backward pass, and in it block by
    block, where the autoencoder can (arXiv 1604.06174). The memory is that of one block's activations on one
    micro-batch, and of the images. The VAE, if it was offloaded, is moved to the latents' device and must be there
    until the backward pass has ended.

    Args:
        latents: as the pipeline's transformer gives them, [B, C, ..., H/8, W/8].
        micro_batch: images that are decoded at a time, at least 1.
    """
    if not (latents.requires_grad and torch.is_grad_enabled()):
        return torch.cat([pipeline.decode(part) for part in latents.split(micro_batch)])
    vae: Any = pipeline.vae.to(latents.device)
    if vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()  # it has an effect with gradient only
    decode = partial(pipeline.family.decode_latents, vae)
    return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in latents.split(micro_batch)])
