"""A distillation from recipe to student: loads the roles, feeds prompts, trains, saves the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fewstep import flow
from fewstep.data.cache import TeacherCache
from fewstep.data.emoji import EmojiWorld
from fewstep.data.images import grid
from fewstep.data.prompts import training_prompts
from fewstep.distill import health
from fewstep.distill.anchors import anchors_of
from fewstep.distill.caching import cache_fingerprint, make_cache
from fewstep.distill.dmd import DecoupledDmd, DmdSettings
from fewstep.distill.renoise import Renoise
from fewstep.distill.roles import Roles, make_roles
from fewstep.distill.shielding import RealLatents, shields_of
from fewstep.distill.trajectory import TrajectoryDistillation, TrajectorySettings
from fewstep.errors import UserError
from fewstep.generate import generate, initial_noise
from fewstep.models.pipeline import TextToImage, load
from fewstep.models.prompts import EncodedPrompts
from fewstep.recipes.schema import CacheRecipe, DistillRecipe, PromptSettings
from fewstep.training.distribution import Ranks
from fewstep.training.method import Batch, Method
from fewstep.training.run import Run
from fewstep.training.trainer import Trainer

SHOWN = 32  # images of a preview


@dataclass(frozen=True)
class Job:
    """What a recipe's method comes to: the algorithm, and where its batches come from."""

    method: Method
    data: Callable[[int], Batch]


#: A student -> what gives metrics of it whenever it is called.
Watch = Callable[[TextToImage], Callable[[], Mapping[str, float]]]


def distill(recipe: DistillRecipe, run: Run, watch: Watch | None = None, ranks: Ranks | None = None) -> Path:
    """Distil, and save the student (its moving average) as ``<run>/student``, an ordinary diffusers folder.

    Goes on from the run's last checkpoint. Returns the student's folder.

    Args:
        watch: measures the student every ``evaluate.every`` steps.
        ranks: the processes that distil together; only the first writes.
    """
    ranks = ranks or Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(recipe.train.seed)
    teacher = load(recipe.teacher, ranks.device)
    prompts = training_prompts(recipe.prompts)
    # what the teacher is to say beforehand it says before it is sharded among the processes
    with ranks.in_turn():
        if recipe.method == "trajectory":
            cache = trajectory_cache(recipe, teacher, run.directory / "cache")
        else:
            real = RealLatents.of(recipe, teacher, prompts, run.directory / "cache")
    roles = make_roles(recipe, teacher, ranks)
    if recipe.method == "trajectory":
        job = trajectory_job(recipe, roles, cache)
    else:
        job = dmd_job(recipe, roles, prompts, real, ranks)
    optim = {name: settings for name, settings in recipe.optim if settings is not None}
    preview = preview_of(roles.student, shown_prompts(recipe.prompts, prompts))
    watched, every = (watch(roles.student), recipe.evaluate.every) if watch and recipe.evaluate.every else (None, 0)
    trainer = Trainer(
        job.method,
        job.data,
        run,
        train=recipe.train,
        optim=optim,
        preview=preview,
        watch=watched,
        watch_every=every,
        alarms=health.ALARMS if recipe.method == "dmd" else (),
        ranks=ranks,
    )
    trainer.fit()
    with trainer.averaged():
        return roles.save(run.directory / "student", ranks)


def dmd_job(recipe: DistillRecipe, roles: Roles, prompts: list[str], real: RealLatents | None, ranks: Ranks) -> Job:
    """Decoupled-DMD on prompts alone. Shields that hold the student to real images bring these, with prompts of their
    own."""
    teacher = roles.teacher
    settings = settings_of(recipe, teacher.shift)
    if recipe.shield.gan and ranks.world > 1:
        raise UserError("shield.gan: its head cannot be trained by several processes yet; use one")
    shields = shields_of(recipe, teacher, settings.renoise, real)
    method = DecoupledDmd(teacher.denoiser, roles.student.denoiser, roles.fake, teacher.encode([""]), settings, shields)
    size, seed = recipe.train.batch_size, recipe.train.seed
    if real is not None and any(shield.wants_real for _, shield in shields):
        return Job(method, real.batches(teacher, size, seed))
    return Job(method, batches(teacher, prompts, size, seed))


def trajectory_cache(recipe: DistillRecipe, teacher: TextToImage, folder: Path) -> TeacherCache:
    """The teacher's trajectories: the recipe's cache, or one made in ``folder``."""
    wanted = recipe.trajectory
    if recipe.student.anchors is not None or recipe.student.sampler != "euler":
        raise UserError("method trajectory: it needs evenly spaced anchors and the euler sampler")
    anchors = anchors_of(recipe)
    guidance = teacher.card.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale
    made_by = cache_fingerprint(teacher, anchors, wanted.substeps, guidance)
    if wanted.cache is not None:
        return TeacherCache(wanted.cache, made_by)
    settings = CacheRecipe(
        kind="cache",
        name=recipe.name,
        teacher=recipe.teacher,
        prompts=recipe.prompts,
        steps=len(anchors),
        substeps=wanted.substeps,
        guidance_scale=guidance,
        samples=wanted.samples,
    )
    return TeacherCache(make_cache(settings, folder, teacher=teacher), made_by)


def trajectory_job(recipe: DistillRecipe, roles: Roles, cache: TeacherCache) -> Job:
    """Regression on a cache of the teacher's trajectories."""
    teacher = roles.teacher
    sigmas = tuple(flow.shift_sigma(u, teacher.shift) for u in anchors_of(recipe))
    method = TrajectoryDistillation(roles.student.denoiser, TrajectorySettings(sigmas))
    height, width = teacher.card.height, teacher.card.width

    def data(position: int) -> tuple[Tensor, EncodedPrompts, Tensor]:
        generator = torch.Generator().manual_seed(recipe.train.seed * 1_000_003 + position)
        chosen = torch.randint(len(cache), (recipe.train.batch_size,), generator=generator).tolist()
        states, prompts = cache.read(chosen)
        noise = initial_noise(teacher, cache.seeds(chosen), height, width)
        return noise, prompts.to(teacher.device), states.to(teacher.device)

    return Job(method, data)


def settings_of(recipe: DistillRecipe, shift: float) -> DmdSettings:
    spear = recipe.spear.weight if recipe.spear.enabled else 0.0
    shield = recipe.shield.weight if recipe.shield.enabled else 0.0
    if not spear and not shield and not recipe.shield.others:
        raise UserError("spear and shield are both off: the student would learn nothing")
    renoise = Renoise(recipe.renoise.schedule, shift, recipe.renoise.sigma_min, recipe.renoise.sigma_max)
    return DmdSettings(
        anchors=tuple(anchors_of(recipe)),
        alpha=recipe.spear.alpha,
        renoise=renoise,
        spear=spear,
        shield=shield,
        normaliser_floor=recipe.normaliser_floor,
        fake_updates=recipe.fake_updates,
        fake_follow=recipe.fake_follow,
        anchor_schedule=recipe.student.anchor_schedule,
        sampler=recipe.student.sampler,
        eta=recipe.student.eta,
    )


def batches(
    model: TextToImage, prompts: list[str], size: int, seed: int
) -> Callable[[int], tuple[Tensor, EncodedPrompts]]:
    """Batch number -> (pure noise, encoded prompts): prompts alone, no images. Each prompt is encoded once, here."""
    encoded = model.encode(prompts)
    shape = model.latent_shape(model.card.height, model.card.width)

    def data(position: int) -> tuple[Tensor, EncodedPrompts]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        chosen = torch.randint(len(prompts), (size,), generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        return noise.to(model.device), encoded[chosen]

    return data


def shown_prompts(settings: PromptSettings, prompts: list[str]) -> list[str]:
    """What previews show: held-out prompts of the emoji world, or the first of the user's own."""
    if settings.source != "emoji":
        return prompts[:SHOWN]
    world = EmojiWorld.load()
    return [world.prompt(concept, i % 3) for i, concept in enumerate(world.sample(SHOWN, "heldout", seed=0))]


def preview_of(student: TextToImage, prompts: list[str]) -> Callable[[int], Image.Image]:
    """The same prompts and seeds each time, as the student of that moment draws them."""

    def preview(step: int) -> Image.Image:
        return grid(generate(student, prompts).images, columns=8)

    return preview
