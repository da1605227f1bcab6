"""A distillation from recipe to student: loads the roles, feeds prompts, trains, saves the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fewstep.config.recipe import DistillRecipe
from fewstep.config.sections import PromptSettings
from fewstep.config.student_schedule import student_timesteps
from fewstep.core import flow
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.method import Method
from fewstep.core.samplers import sample_euler
from fewstep.data.batch import Batches, DistillBatch
from fewstep.data.images import grid
from fewstep.data.prompt_shards import PromptShards
from fewstep.data.prompts import training_prompts
from fewstep.data.trajectories import text_fingerprint
from fewstep.emoji.dataset import EmojiDataset
from fewstep.errors import UserError
from fewstep.inference.batching import batched, max_batch_size
from fewstep.inference.generate import generate
from fewstep.methods.dmd import monitor
from fewstep.methods.dmd.build_terms import build_terms, real_batches
from fewstep.methods.dmd.method import DecoupledDMD, DMDSettings
from fewstep.methods.dmd.renoise import Renoise
from fewstep.methods.models_setup import Models, build_models
from fewstep.methods.trajectory import TrajectoryDistillation, TrajectorySettings
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.zimage.denoiser import PATCH
from fewstep.training.distributed import DistContext
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

PREVIEW_IMAGES = 32  # images of a preview
REFERENCE_STEPS = 16  # of the teacher's images that the student's latents are compared with


@dataclass(frozen=True)
class TrainingJob:
    """What a recipe's method comes to: the algorithm, and where its batches come from."""

    method: Method
    data: Batches


#: A student -> what gives metrics of it whenever it is called.
Validator = Callable[[TextToImagePipeline], Callable[[], Mapping[str, float]]]


def distill(
    recipe: DistillRecipe,
    run: RunDir,
    watch: Validator | None = None,
    dist: DistContext | None = None,
    cache: Path | None = None,
) -> Path:
    """Distil, and save the student (its moving average) as ``<run>/student``, an ordinary diffusers folder; what was
    best by ``train.keep_best``, if that was not the last step, as ``<run>/student-best``.

    Goes on from the run's last checkpoint. Returns the student's folder.

    Args:
        watch: measures the student every ``evaluate.every`` steps.
        dist: the processes that distil together; only the first writes.
        cache: where the teacher's trajectories are kept; unset, in the run.
    """
    dist = dist or DistContext(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(recipe.train.seed)
    prompts = training_prompts(recipe.prompts)  # first: a mistake there should not wait for the teacher
    dtype = torch.float32 if recipe.roles.base == "fp32" else torch.bfloat16
    teacher = load(recipe.teacher, dist.device, dtype, offload="model")
    teacher.set_resolution(recipe.size)
    # what the teacher is to say beforehand it says before it is sharded among the processes
    real: Batches | None = None
    with dist.main_process_first():
        if recipe.asks_teacher_first:
            real = real_batches(recipe, teacher, prompts, cache or run.directory / "cache")
    roles = build_models(recipe, teacher, dist)
    if recipe.method == "trajectory":
        assert real is not None
        sigmas = tuple(flow.sigmas_from_timesteps(student_timesteps(recipe), teacher.shift))
        job = TrainingJob(TrajectoryDistillation(roles.student.denoiser, TrajectorySettings(sigmas)), real)
    else:
        job = dmd_job(recipe, roles, prompts, real, dist)
    roles.student.enable_model_cpu_offload()
    optim = {name: settings for name, settings in recipe.optim if settings is not None}
    preview = make_preview(roles.student, preview_prompts(recipe.prompts, prompts))
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
        alarms=monitor.ALERT_RULES if recipe.method == "dmd" else (),
        dist=dist,
    )
    trainer.fit()
    with trainer.ema_weights():
        student = roles.save(run.directory / "student", dist)
    if trainer.load_best():
        with trainer.ema_weights():
            roles.save(run.directory / "student-best", dist)
    return student


def dmd_job(
    recipe: DistillRecipe, roles: Models, prompts: Sequence[str], real: Batches | None, dist: DistContext
) -> TrainingJob:
    """Decoupled-DMD on prompts alone. Shields that hold the student to real images bring these, with prompts of their
    own."""
    teacher = roles.teacher
    settings = dmd_config(recipe, teacher.shift)
    _check_scales(recipe, teacher)
    student = roles.student.denoiser
    shields = build_terms(recipe, teacher, student, settings.sigmas, settings.renoise, real, dist)
    looks = teacher_latent_stats(recipe, teacher, prompts, real)
    method = DecoupledDMD(teacher.denoiser, student, roles.fake, teacher.encode([""]), settings, shields, looks)
    if real is not None and (recipe.align or any(shield.wants_real for _, shield in shields)):
        return TrainingJob(method, real)
    return TrainingJob(method, prompt_batches(teacher, prompts, recipe.train.batch_size, recipe.train.seed))


def teacher_latent_stats(
    recipe: DistillRecipe, teacher: TextToImagePipeline, prompts: Sequence[str], real: Batches | None
) -> dict[str, float]:
    """``monitor.latent_stats`` of the guided teacher's latents, cached or made here; empty with alerts off."""
    if recipe.train.on_alert == "off":
        return {}
    if real is not None and recipe.shield.real == "teacher":
        return {name: float(value) for name, value in monitor.latent_stats(real(0).real).items()}
    height, width = teacher.generation_config.height, teacher.generation_config.width
    count = 16 if height * width <= 256**2 else 4  # large images have latents enough
    shown = teacher.encode([prompts[i * len(prompts) // count] for i in range(count)])
    noise = initial_noise(teacher, range(count), height, width)
    denoiser = ClassifierFreeGuidance(
        teacher.denoiser, teacher.encode([""]), 1 + teacher.generation_config.guidance_scale
    )
    sigmas = flow.get_sigmas(REFERENCE_STEPS, teacher.shift)
    with torch.no_grad():
        parts = batched(count, max_batch_size(height, width))
        latents = torch.cat([sample_euler(denoiser, noise[part], sigmas, shown[part]) for part in parts])
    return {name: float(value) for name, value in monitor.latent_stats(latents).items()}


def _check_scales(recipe: DistillRecipe, teacher: TextToImagePipeline) -> None:
    """Raises: UserError for a latent that cannot be made so much smaller."""
    rows, columns = teacher.latent_shape(teacher.generation_config.height, teacher.generation_config.width)[-2:]
    for factor in recipe.shield.scales:
        if rows % (factor * PATCH) or columns % (factor * PATCH):
            raise UserError(
                f"shield.scales: latents of {rows}x{columns} cannot be {factor} times coarser, in patches of {PATCH}"
            )


def dmd_config(recipe: DistillRecipe, shift: float) -> DMDSettings:
    spear = recipe.spear.weight if recipe.spear.enabled else 0.0
    shield = recipe.shield.weight if recipe.shield.enabled else 0.0
    if not spear and not shield and not recipe.shield.others:
        raise UserError("spear and shield are both off: the student would learn nothing")
    renoise = Renoise(recipe.renoise.schedule, shift, recipe.renoise.sigma_min, recipe.renoise.sigma_max)
    return DMDSettings(
        anchors=tuple(student_timesteps(recipe)),
        alpha=recipe.spear.alpha,
        renoise=renoise,
        spear=spear,
        shield=shield,
        scales=tuple((factor, weight) for factor, weight in sorted(recipe.shield.scales.items()) if weight),
        dmd_norm_eps=recipe.dmd_norm_eps,
        fake_updates=recipe.fake_updates,
        align_steps=round(recipe.align * recipe.train.steps),
        fake_warmup=recipe.fake_warmup,
        fake_follow=recipe.fake_follow,
        anchor_schedule=recipe.student.anchor_schedule,
        sampler=recipe.student.sampler,
        eta=recipe.student.eta,
    )


def prompt_batches(model: TextToImagePipeline, prompts: Sequence[str], size: int, seed: int) -> Batches:
    """Batch number -> (pure noise, encoded prompts): prompts alone, no images. Each prompt is encoded once, here, or
    was so before."""
    encoded: PromptShards | EncodedPrompts = prompts if isinstance(prompts, PromptShards) else model.encode(prompts)
    if isinstance(encoded, PromptShards):
        encoded.check(text_fingerprint(model.encoder))
    shape = model.latent_shape(model.generation_config.height, model.generation_config.width)

    def data(position: int) -> DistillBatch:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        chosen = torch.randint(len(prompts), (size,), generator=generator)
        noise = torch.randn(size, *shape, generator=generator)
        rows = encoded.encoded(chosen.tolist()) if isinstance(encoded, PromptShards) else encoded[chosen]
        return DistillBatch(noise.to(model.device), rows.to(model.device))

    return data


def preview_prompts(settings: PromptSettings, prompts: Sequence[str]) -> list[str]:
    """What previews show: held-out prompts of the emoji world, or the first of the user's own."""
    if settings.source != "emoji":
        return list(prompts[:PREVIEW_IMAGES])
    world = EmojiDataset.load()
    return [world.prompt(concept, i % 3) for i, concept in enumerate(world.sample(PREVIEW_IMAGES, "heldout", seed=0))]


def make_preview(student: TextToImagePipeline, prompts: Sequence[str]) -> Callable[[int], Image.Image]:
    """The same prompts and seeds each time, as the student of that moment draws them."""

    def preview(step: int) -> Image.Image:
        return grid(generate(student, prompts).images, columns=8)

    return preview
