"""What a perfect teacher of the emoji world would make of few steps: a bound that no training moves.

For a finite set of images the best denoiser is known in closed form: a softmax over distances. Here it knows a number
of real images of each prompt, in random places, and is sampled as a model is, without and with guidance. Each image
then is judged. It shows how much of "few steps are bad" belongs to the world, and how much to an imperfect model.

    python benchmarks/ideal.py [--prompts 100] [--images 128]
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core import flow
from fewstep.emoji.classifier import EmojiClassifier, correct
from fewstep.emoji.dataset import EmojiDataset, EmojiSpec
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.metrics import frechet_distance
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.progress import track


def velocity(x: Tensor, sigma: float, known: Tensor) -> Tensor:
    """The best velocity for x [B, N] where data are one of ``known``: [K, N], or [B, K, N] for others in each row."""
    if known.ndim == 2:
        distance = torch.cdist(x, (1 - sigma) * known)
    else:
        distance = torch.cdist(x[:, None], (1 - sigma) * known).squeeze(1)
    weight = torch.softmax(-distance.square() / (2 * sigma**2), dim=1)
    x0 = weight @ known if known.ndim == 2 else torch.einsum("bk,bkn->bn", weight, known)
    return flow.velocity_from_x0(x, sigma, x0)


def sample(noise: Tensor, known: Tensor, steps: int, guidance: float, shift: float) -> Tensor:
    """Euler's method; the null prompt's denoiser knows the images of all prompts."""
    every = known.flatten(0, 1)
    sigmas, x = flow.get_sigmas(steps, shift), noise
    for sigma, sigma_next in pairwise(sigmas):
        v = velocity(x, sigma, known)
        if guidance:
            v = v + guidance * (v - velocity(x, sigma, every))
        x = x + (sigma_next - sigma) * v
    return x


def images_of(model: TextToImagePipeline, world: EmojiDataset, concepts: list[EmojiSpec], count: int) -> Tensor:
    """Latents [P, count, N] of ``count`` real images of each concept."""
    generator = torch.Generator().manual_seed(1)
    wanted = [concept for concept in concepts for _ in range(count)]
    parts = [
        model.encode_images(world.render(wanted[start : start + 256], generator))
        for start in track(range(0, len(wanted), 256), "encoding images")
    ]
    return torch.cat(parts).flatten(1).unflatten(0, (len(concepts), count))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="micro", help="whose autoencoder and shift to use")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--images", type=int, default=128, help="that the denoiser knows of each prompt")
    arguments = parser.parse_args()
    model, world, judge, net = load(arguments.teacher), EmojiDataset.load(), EmojiClassifier.load(), FeatureNet()
    concepts = world.sample(arguments.prompts, "test", seed=3)
    known = images_of(model, world, concepts, arguments.images)
    shape = model.latent_shape(64, 64)
    noise = torch.randn(len(concepts), known.shape[-1], generator=torch.Generator().manual_seed(5))
    guidance, reference = model.generation_config.guidance_scale, None
    for steps, scale in ((50, guidance), (50, 0.0), (4, 0.0), (4, guidance)):
        latents = sample(noise, known, steps, scale, model.shift)
        images = torch.cat([model.decode(part) for part in latents.unflatten(1, shape).split(50)])
        features = net(images)
        reference = features if reference is None else reference
        right = {key: f"{hit.float().mean():.1%}" for key, hit in correct(judge(images), concepts).items()}
        apart = frechet_distance(features, reference)
        print(f"{steps} steps, guidance {scale:g}: {right}, Fréchet distance to the first {apart:.1f}", flush=True)


if __name__ == "__main__":
    main()
