"""The shields that a recipe asks for, and the real latents that some of them hold the student to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.cache import TeacherCache
from fewstep.data.emoji import EmojiWorld
from fewstep.distill.caching import cache_fingerprint, make_cache
from fewstep.distill.gan import Gan
from fewstep.distill.renoise import Renoise
from fewstep.distill.shields import FeatureMmd, MeanVariance, Regression, Shield
from fewstep.errors import UserError
from fewstep.generate import initial_noise
from fewstep.models.pipeline import TextToImage
from fewstep.models.prompts import EncodedPrompts
from fewstep.recipes.schema import CacheRecipe, DistillRecipe

SUBSTEPS = 24  # of the teacher, for images that stand for real ones


@dataclass(frozen=True)
class RealLatents:
    """Latents [N, C, H, W] with their encoded prompts: images of the teacher, with the noise they were made of, or
    data, without."""

    latents: Tensor
    prompts: EncodedPrompts
    noise: Tensor | None = None

    @staticmethod
    def of(recipe: DistillRecipe, teacher: TextToImage, prompts: Sequence[str], folder: Path) -> RealLatents | None:
        """What the recipe's shields need: None where they need nothing."""
        shield = recipe.shield
        if not shield.others:
            return None
        if shield.real == "data":
            return drawn(teacher, prompts, shield.real_samples, recipe.train.seed)
        return generated(recipe, teacher, folder)

    def batches(
        self, model: TextToImage, size: int, seed: int
    ) -> Callable[[int], tuple[Tensor, EncodedPrompts, Tensor]]:
        """Batch number -> (pure noise, encoded prompts, real latents of these prompts, and of this noise if they have
        one)."""

        def data(position: int) -> tuple[Tensor, EncodedPrompts, Tensor]:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
            chosen = torch.randint(len(self.latents), (size,), generator=generator)
            if self.noise is not None:
                noise = self.noise[chosen]
            else:
                noise = torch.randn(size, *self.latents.shape[1:], generator=generator)
            return noise.to(model.device), self.prompts[chosen], self.latents[chosen].to(model.device)

        return data


def generated(recipe: DistillRecipe, teacher: TextToImage, folder: Path) -> RealLatents:
    """Images of the guided teacher, kept in ``folder`` as a cache of one state."""
    made = CacheRecipe(
        kind="cache",
        name=recipe.name,
        teacher=recipe.teacher,
        prompts=recipe.prompts,
        steps=1,
        substeps=SUBSTEPS,
        samples=recipe.shield.real_samples,
        shard_size=64,  # one batch a file: an interruption loses seconds
    )
    make_cache(made, folder, teacher=teacher)
    cache = TeacherCache(folder, cache_fingerprint(teacher, [1.0], SUBSTEPS, teacher.card.guidance_scale))
    states, prompts = cache.read(range(len(cache)))
    noise = initial_noise(teacher, cache.seeds(range(len(cache))), teacher.card.height, teacher.card.width)
    return RealLatents(states[:, 0], prompts.to(teacher.device), noise)


def drawn(teacher: TextToImage, prompts: Sequence[str], count: int, seed: int) -> RealLatents:
    """The emoji world's own images of ``count`` prompts drawn at random, through the teacher's autoencoder.

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
    latents = torch.cat([teacher.encode_images(part.to(teacher.device)) for part in images.split(128)])
    return RealLatents(latents.cpu(), teacher.encode(chosen))


def shields_of(
    recipe: DistillRecipe, teacher: TextToImage, renoise: Renoise, real: RealLatents | None
) -> list[tuple[float, Shield]]:
    """The recipe's shields beyond distribution matching, each with its weight."""
    if real is None:
        return []
    weights, found = recipe.shield, list[tuple[float, Shield]]()
    if weights.mean_variance:
        each = real.latents.flatten(1)
        spread = each.var(dim=1, correction=0).mean().sqrt()
        found.append((weights.mean_variance, MeanVariance(each.mean().item(), spread.item())))
    if weights.regression:
        found.append((weights.regression, Regression()))
    if weights.mmd:
        found.append((weights.mmd, FeatureMmd(teacher.denoiser, renoise)))
    if weights.gan:
        gan = Gan(teacher.denoiser, teacher.transformer.config["dim"], renoise, weights.gan_penalty)
        gan.module.to(teacher.device)
        found.append((weights.gan, gan))
    return found
