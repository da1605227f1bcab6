"""The quality of the micro autoencoder on real held-out images, with exact latents and with noise on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.emoji.dataset import NUM_TEMPLATES, EmojiDataset
from fewstep.emoji.nearest_real import NearestReal
from fewstep.evaluation.images import as_uint8
from fewstep.evaluation.metrics import frechet_distance, hf_energy

LATENT_NOISE = (0.0, 0.1, 0.2, 0.3, 0.5)


def psnr(images: Tensor, decoded: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images [N, 3, H, W] in [0, 1], averaged over the images."""
    error = (images - decoded).square().flatten(1).mean(1)
    return float((-10 * error.clamp(min=1e-10).log10()).mean())


@torch.no_grad()
def measure_vae(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], count: int = 200, seed: int = 1
) -> dict[str, dict[str, float]]:
    """psnr, nearest_real_acc, sharpness and fd_real (the Fréchet distance of features to other real images of the same
    prompts) of ``count`` test images after encoding and decoding, by the standard deviation of noise that is added to
    the latents.

    Args:
        encode: images [B, 3, H, W] in [0, 1] -> normalized latents [B, C, H, W], with a standard deviation of 1.
        decode: the inverse.
    """
    dataset, scorer = EmojiDataset.load(), NearestReal()
    specs = dataset.sample(count, "test")
    prompts = [dataset.prompt(spec, index % NUM_TEMPLATES) for index, spec in enumerate(specs)]
    generator = torch.Generator().manual_seed(seed)
    images = dataset.render(specs, generator)
    reference = scorer.network(as_uint8(dataset.render(specs, torch.Generator().manual_seed(seed + 1))))
    latents = encode(images)
    eps = torch.randn(latents.shape, generator=generator)
    quality = {}
    for noise in LATENT_NOISE:
        decoded = decode(latents + noise * eps).clamp(0, 1)
        quality[f"{noise:g}"] = {
            "psnr": psnr(images, decoded),
            "nearest_real_acc": float(scorer.score(as_uint8(decoded), prompts)["nearest_real_acc"].mean()),
            "sharpness": hf_energy(decoded) / hf_energy(images),
            "fd_real": frechet_distance(scorer.network(as_uint8(decoded)), reference),
        }
    return quality
