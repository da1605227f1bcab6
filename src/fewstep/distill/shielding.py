"""The shields that a recipe asks for, and the real latents that some of them hold the student to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.data.emoji import EmojiWorld
from fewstep.distill.batch import Batches, DistillBatch
from fewstep.distill.caching import cache_of, cached_batches
from fewstep.distill.gan import Gan
from fewstep.distill.renoise import Renoise
from fewstep.distill.shields import FeatureMmd, MeanVariance, Regression, Shield
from fewstep.errors import UserError
from fewstep.models.denoiser import Denoiser
from fewstep.models.pipeline import TextToImage
from fewstep.recipes.schema import DistillRecipe
from fewstep.training.distribution import Ranks

_MEASURED = 512  # real latents that mean-variance takes its targets from, at least


def real_batches(recipe: DistillRecipe, teacher: TextToImage, prompts: Sequence[str], folder: Path) -> Batches:
    """Batches with what the recipe holds its student to: the guided teacher's own way from the batch's noise, kept in
    ``folder``, or the emoji world's images."""
    size, seed = recipe.train.batch_size, recipe.train.seed
    if recipe.method == "dmd" and recipe.shield.real == "data":
        return drawn(teacher, prompts, recipe.shield.real_samples, size, seed)
    return cached_batches(cache_of(recipe, teacher, folder), teacher, size, seed)


def drawn(teacher: TextToImage, prompts: Sequence[str], count: int, size: int, seed: int) -> Batches:
    """Batches of ``size`` out of ``count`` of the emoji world's own images, through the teacher's autoencoder.

    Raises:
        UserError: a prompt that the emoji world does not know.
    """
    world = EmojiWorld.load()
    generator = torch.Generator().manual_seed(seed)
    chosen = [prompts[i] for i in torch.randint(len(prompts), (count,), generator=generator).tolist()]
    concepts = []
    for prompt in chosen:
        concept = world.parse(prompt)
        if concept is None:
            raise UserError(f"shield.real=data: the emoji world has no image of {prompt!r}; set shield.real=teacher")
        concepts.append(concept)
    images = world.render(concepts, generator, teacher.card.height)
    latents = torch.cat([teacher.encode_images(part.to(teacher.device)) for part in images.split(128)]).cpu()
    encoded = teacher.encode(chosen)

    def data(position: int) -> DistillBatch:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        some = torch.randint(count, (size,), generator=generator)
        noise = torch.randn(size, *latents.shape[1:], generator=generator)
        return DistillBatch(noise.to(teacher.device), encoded[some], latents[some, None].to(teacher.device))

    return data


def shields_of(
    recipe: DistillRecipe,
    teacher: TextToImage,
    student: Denoiser,
    sigmas: Sequence[float],
    renoise: Renoise,
    real: Batches | None,
    ranks: Ranks,
) -> list[tuple[float, Shield]]:
    """The recipe's shields beyond distribution matching, each with its weight.

    Args:
        sigmas: the student's levels.
    """
    if real is None:
        return []
    weights, found = recipe.shield, list[tuple[float, Shield]]()
    if weights.mean_variance:
        batches = -(-_MEASURED // recipe.train.batch_size)
        each = torch.cat([real(position).real for position in range(batches)]).flatten(1)
        spread = each.var(dim=1, correction=0).mean().sqrt()
        found.append((weights.mean_variance, MeanVariance(each.mean().item(), spread.item())))
    if weights.regression:
        found.append((weights.regression, Regression(student, sigmas)))
    if weights.mmd:
        found.append((weights.mmd, FeatureMmd(teacher.denoiser, renoise, ranks.together)))
    if weights.gan:
        gan = Gan(teacher.denoiser, teacher.transformer.config["dim"], renoise, weights.gan_penalty)
        ranks.agree(gan.module.to(teacher.device))
        found.append((weights.gan, gan))
    return found
