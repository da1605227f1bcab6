"""A distillation from recipe to student: loads the roles, feeds prompts, trains, saves the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fewstep import flow
from fewstep.data.cache import text_fingerprint
from fewstep.data.emoji import EmojiWorld
from fewstep.data.images import grid
from fewstep.data.prompt_shards import PromptShards
from fewstep.data.prompts import training_prompts
from fewstep.distill import health
from fewstep.distill.anchors import anchors_of
from fewstep.distill.batch import Batches, DistillBatch
from fewstep.distill.dmd import DecoupledDmd, DmdSettings
from fewstep.distill.renoise import Renoise
from fewstep.distill.roles import Roles, make_roles
from fewstep.distill.shielding import real_batches, shields_of
from fewstep.distill.trajectory import TrajectoryDistillation, TrajectorySettings
from fewstep.errors import UserError
from fewstep.generate import at_once, batched, generate, initial_noise
from fewstep.models.denoiser import Guided
from fewstep.models.pipeline import TextToImage, load
from fewstep.models.prompts import EncodedPrompts
from fewstep.models.zimage import PATCH
from fewstep.recipes.schema import DistillRecipe
from fewstep.recipes.settings import PromptSettings
from fewstep.samplers import sample_euler
from fewstep.training.distribution import Ranks
from fewstep.training.method import Method
from fewstep.training.run import Run
from fewstep.training.trainer import Trainer

SHOWN = 32  # images of a preview
LOOKED_STEPS = 16  # of the teacher's images that the student's latents are compared with


@dataclass(frozen=True)
class Job:
    """What a recipe's method comes to: the algorithm, and where its batches come from."""

    method: Method
    data: Batches


#: A student -> what gives metrics of it whenever it is called.
Watch = Callable[[TextToImage], Callable[[], Mapping[str, float]]]


def distill(
    recipe: DistillRecipe, run: Run, watch: Watch | None = None, ranks: Ranks | None = None, cache: Path | None = None
) -> Path:
    """Distil, and save the student (its moving average) as ``<run>/student``, an ordinary diffusers folder; what was
    best by ``train.keep_best``, if that was not the last step, as ``<run>/student-best``.

    Goes on from the run's last checkpoint. Returns the student's folder.

    Args:
        watch: measures the student every ``evaluate.every`` steps.
        ranks: the processes that distil together; only the first writes.
        cache: where the teacher's trajectories are kept; unset, in the run.
    """
    ranks = ranks or Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(recipe.train.seed)
    prompts = training_prompts(recipe.prompts)  # first: a mistake there should not wait for the teacher
    dtype = torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16
    teacher = load(recipe.teacher, ranks.device, dtype, offload="parts")
    teacher.at_size(recipe.size)
    # what the teacher is to say beforehand it says before it is sharded among the processes
    real: Batches | None = None
    with ranks.in_turn():
        if recipe.asks_teacher_first:
            real = real_batches(recipe, teacher, prompts, cache or run.directory / "cache")
    roles = make_roles(recipe, teacher, ranks)
    if recipe.method == "trajectory":
        assert real is not None
        sigmas = tuple(flow.shift_sigma(u, teacher.shift) for u in anchors_of(recipe))
        job = Job(TrajectoryDistillation(roles.student.denoiser, TrajectorySettings(sigmas)), real)
    else:
        job = dmd_job(recipe, roles, prompts, real, ranks)
    roles.student.rest()
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
        student = roles.save(run.directory / "student", ranks)
    if trainer.recall_best():
        with trainer.averaged():
            roles.save(run.directory / "student-best", ranks)
    return student


def dmd_job(recipe: DistillRecipe, roles: Roles, prompts: Sequence[str], real: Batches | None, ranks: Ranks) -> Job:
    """Decoupled-DMD on prompts alone. Shields that hold the student to real images bring these, with prompts of their
    own."""
    teacher = roles.teacher
    settings = settings_of(recipe, teacher.shift)
    _check_scales(recipe, teacher)
    student = roles.student.denoiser
    shields = shields_of(recipe, teacher, student, settings.sigmas, settings.renoise, real, ranks)
    looks = teachers_looks(recipe, teacher, prompts, real)
    method = DecoupledDmd(teacher.denoiser, student, roles.fake, teacher.encode([""]), settings, shields, looks)
    if real is not None and (recipe.align or any(shield.wants_real for _, shield in shields)):
        return Job(method, real)
    return Job(method, batches(teacher, prompts, recipe.train.batch_size, recipe.train.seed))


def teachers_looks(
    recipe: DistillRecipe, teacher: TextToImage, prompts: Sequence[str], real: Batches | None
) -> dict[str, float]:
    """``health.pattern`` of the guided teacher's latents: of those that it has made already, or of a few made here.
    Nothing where no alarm would ask for it."""
    if recipe.train.alarms == "off":
        return {}
    if real is not None and recipe.shield.real == "teacher":
        return {name: float(value) for name, value in health.pattern(real(0).real).items()}
    height, width = teacher.card.height, teacher.card.width
    count = 16 if height * width <= 256**2 else 4  # large images have latents enough
    shown = teacher.encode([prompts[i * len(prompts) // count] for i in range(count)])
    noise = initial_noise(teacher, range(count), height, width)
    denoiser = Guided(teacher.denoiser, teacher.encode([""]), 1 + teacher.card.guidance_scale)
    sigmas = [flow.shift_sigma(u, teacher.shift) for u in flow.uniform_anchors(LOOKED_STEPS)]
    with torch.no_grad():
        parts = batched(count, at_once(height, width))
        latents = torch.cat([sample_euler(denoiser, noise[part], sigmas, shown[part]) for part in parts])
    return {name: float(value) for name, value in health.pattern(latents).items()}


def _check_scales(recipe: DistillRecipe, teacher: TextToImage) -> None:
    """Raises: UserError for a latent that cannot be made so much smaller."""
    rows, columns = teacher.latent_shape(teacher.card.height, teacher.card.width)[-2:]
    for factor in recipe.shield.scales:
        if rows % (factor * PATCH) or columns % (factor * PATCH):
            raise UserError(
                f"shield.scales: latents of {rows}x{columns} cannot be {factor} times coarser, in patches of {PATCH}"
            )


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
        scales=tuple((factor, weight) for factor, weight in sorted(recipe.shield.scales.items()) if weight),
        normaliser_floor=recipe.normaliser_floor,
        fake_updates=recipe.fake_updates,
        align_steps=round(recipe.align * recipe.train.steps),
        fake_warmup=recipe.fake_warmup,
        fake_follow=recipe.fake_follow,
        anchor_schedule=recipe.student.anchor_schedule,
        sampler=recipe.student.sampler,
        eta=recipe.student.eta,
    )


def batches(model: TextToImage, prompts: Sequence[str], size: int, seed: int) -> Batches:
    """Batch number -> (pure noise, encoded prompts): prompts alone, no images. Each prompt is encoded once, here, or
    was so before."""
    encoded: PromptShards | EncodedPrompts = prompts if isinstance(prompts, PromptShards) else model.encode(prompts)
    if isinstance(encoded, PromptShards):
        encoded.check(text_fingerprint(model.encoder))
    shape = model.latent_shape(model.card.height, model.card.width)

    def data(position: int) -> DistillBatch:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        chosen = torch.randint(len(prompts), (size,), generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        rows = encoded.encoded(chosen.tolist()) if isinstance(encoded, PromptShards) else encoded[chosen]
        return DistillBatch(noise.to(model.device), rows.to(model.device))

    return data


def shown_prompts(settings: PromptSettings, prompts: Sequence[str]) -> list[str]:
    """What previews show: held-out prompts of the emoji world, or the first of the user's own."""
    if settings.source != "emoji":
        return list(prompts[:SHOWN])
    world = EmojiWorld.load()
    return [world.prompt(concept, i % 3) for i, concept in enumerate(world.sample(SHOWN, "heldout", seed=0))]


def preview_of(student: TextToImage, prompts: Sequence[str]) -> Callable[[int], Image.Image]:
    """The same prompts and seeds each time, as the student of that moment draws them."""

    def preview(step: int) -> Image.Image:
        return grid(generate(student, prompts).images, columns=8)

    return preview
