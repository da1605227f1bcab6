"""Images to normalized latents and back with diffusers' ``AutoencoderKL``, as its pipelines do it."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> latents [B, C, H/8, W/8] of standard deviation about 1: the posterior's mode."""
    latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents -> images [B, 3, H, W] in [0, 1]; gradients pass, except where a pixel is clipped."""
    return (decode_unclipped(vae, latents) / 2 + 0.5).clamp(0, 1)


def decode_unclipped(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents -> images [B, 3, H, W] around [-1, 1], with gradients everywhere: the output of the decoder, in fp32."""
    raw = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(raw).sample.float()


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """Pixels of an image's side for one of the latent's (diffusers' ``vae_scale_factor``)."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def to_channels_last(vae: AutoencoderKL) -> AutoencoderKL:
    """The memory layout in which convolutions are fastest, on CPUs and GPUs; one of videos is left as it is."""
    if any(parameter.ndim == 5 for parameter in vae.parameters()):
        return vae
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
