"""The shields that a recipe asks for, and the real latents that some of them hold the student to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.config.recipe import DistillRecipe
from fewstep.core.denoiser import Denoiser
from fewstep.core.registry import image_sources
from fewstep.data.batch import Batches, DistillBatch
from fewstep.data.teacher_trajectories import open_trajectory_cache, teacher_batches
from fewstep.errors import UserError
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.dmd.terms.gan import GANTerm
from fewstep.methods.dmd.terms.shields import FeatureMMDTerm, LossTerm, MeanVarianceTerm, TrajectoryMSETerm
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.training.distributed import DistContext

_MEASURED = 512  # real latents that mean-variance takes its targets from, at least


def real_batches(recipe: DistillRecipe, teacher: TextToImagePipeline, prompts: Sequence[str], folder: Path) -> Batches:
    """Batches with what the recipe holds its student to: the guided teacher's own way from the batch's noise, kept in
    ``folder``, or the real images of an image source."""
    size, seed = recipe.train.batch_size, recipe.train.seed
    if recipe.method == "dmd" and recipe.shield.real != "teacher":
        return rendered_image_batches(recipe.shield.real, teacher, prompts, recipe.shield.real_samples, size, seed)
    return teacher_batches(open_trajectory_cache(recipe, teacher, folder), teacher, size, seed)


def rendered_image_batches(
    source: str, teacher: TextToImagePipeline, prompts: Sequence[str], count: int, size: int, seed: int
) -> Batches:
    """Batches of ``size`` out of ``count`` real images of the image source, encoded by the teacher's autoencoder.

    Raises:
        UserError: there is no such source, or it has no image of a prompt.
    """
    images_of = image_sources.get(source)()
    generator = torch.Generator().manual_seed(seed)
    chosen = [prompts[i] for i in torch.randint(len(prompts), (count,), generator=generator).tolist()]
    unknown = next((prompt for prompt in chosen if not images_of.knows(prompt)), None)
    if unknown is not None:
        raise UserError(f"shield.real={source}: there is no image of {unknown!r}; set shield.real=teacher")
    images = images_of.render(chosen, generator, teacher.generation_config.height)
    latents = torch.cat([teacher.encode_images(part.to(teacher.device)) for part in images.split(128)]).cpu()
    encoded = teacher.encode(chosen)

    def data(position: int) -> DistillBatch:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        some = torch.randint(count, (size,), generator=generator)
        noise = torch.randn(size, *latents.shape[1:], generator=generator)
        return DistillBatch(noise.to(teacher.device), encoded[some], latents[some, None].to(teacher.device))

    return data


def build_terms(
    recipe: DistillRecipe,
    teacher: TextToImagePipeline,
    student: Denoiser,
    sigmas: Sequence[float],
    renoise: Renoise,
    real: Batches | None,
    dist: DistContext,
) -> list[tuple[float, LossTerm]]:
    """The recipe's shields beyond distribution matching, each with its weight.

    Args:
        sigmas: the student's levels.
    """
    if real is None:
        return []
    weights, found = recipe.shield, list[tuple[float, LossTerm]]()
    if weights.mean_variance:
        batches = -(-_MEASURED // recipe.train.batch_size)
        each = torch.cat([real(position).real for position in range(batches)]).flatten(1)
        spread = each.var(dim=1, correction=0).mean().sqrt()
        found.append((weights.mean_variance, MeanVarianceTerm(each.mean().item(), spread.item())))
    if weights.regression:
        found.append((weights.regression, TrajectoryMSETerm(student, sigmas)))
    if weights.mmd:
        found.append((weights.mmd, FeatureMMDTerm(teacher.denoiser, renoise, dist.all_gather)))
    if weights.gan:
        gan = GANTerm(teacher.denoiser, teacher.transformer.config["dim"], renoise, weights.gan_penalty)
        dist.broadcast(gan.module.to(teacher.device))
        found.append((weights.gan, gan))
    return found
