"""The teacher's trajectories from noise to image, sampled once and cached: for `fewstep cache-trajectories`, and for
distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fewstep.config.recipe import CacheRecipe, DistillRecipe
from fewstep.core import flow
from fewstep.core.batching import batched, max_batch_size
from fewstep.core.conditioning import EncodedPrompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.device import AUTO
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.method import BatchSource, Shard
from fewstep.core.precision import uses_bf16, warn_if_emulated
from fewstep.core.samplers import iterate
from fewstep.core.seeds import generator
from fewstep.data.batch import DistillBatch
from fewstep.data.encodable_texts import EncodableTexts
from fewstep.data.prompt_stream import TrainingPrompts, listed
from fewstep.data.prompts import check_held_out, open_prompts
from fewstep.data.text_prompts import encodable
from fewstep.data.trajectories import (
    INDEX,
    Index,
    TrajectoryCache,
    check_cache_folder,
    delete_cache,
    fingerprint,
    is_complete,
    shard_file,
    write_index,
    write_shard,
)
from fewstep.models.noise import initial_noise
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.outputs import claimed_folder
from fewstep.progress import track


def subdivide(anchors: list[float], substeps: int) -> list[float]:
    """Pre-shift levels: each interval between anchors, the last one down to 0, in ``substeps`` equal parts."""
    ends = [*anchors[1:], 0.0]
    return [
        start + (end - start) * part / substeps
        for start, end in zip(anchors, ends, strict=True)
        for part in range(substeps)
    ]


@torch.no_grad()
def teacher_trajectory(
    teacher: Denoiser, noise: Tensor, anchors: list[float], substeps: int, shift: float, prompts: EncodedPrompts
) -> Tensor:
    """The teacher's states at the student's levels: Euler with ``substeps`` steps between one anchor and the next.

    Args:
        noise: [B, C, ..., H, W].
        anchors: K pre-shift levels from 1 down, without the terminal 0.

    Returns:
        [B, K, C, ..., H, W]: at anchors 1 to K - 1, then at 0.
    """
    sigmas = flow.sigmas_from_timesteps(subdivide(anchors, substeps), shift)
    steps = iterate(teacher, noise, sigmas, prompts)
    return torch.stack([step.x_next for step in steps if (step.index + 1) % substeps == 0], dim=1)


def cache_fingerprint(
    teacher: TextToImagePipeline, anchors: list[float], substeps: int, guidance: float
) -> dict[str, object]:
    """What identifies a cache of this teacher's trajectories at these pre-shift levels."""
    sigmas = [flow.shift_sigma(u, teacher.shift) for u in subdivide(anchors, substeps)]
    latent = list(teacher.latent_shape(*teacher.generation_config.size))
    return fingerprint(teacher, sigmas, states=len(anchors), guidance_scale=guidance, latent=latent)


def make_cache(
    recipe: CacheRecipe,
    out: Path,
    *,
    overwrite: bool = False,
    teacher: TextToImagePipeline | None = None,
    prompts: Sequence[str] | None = None,
    device: str | torch.device = AUTO,
    process: Shard = Shard(),  # noqa: B008  # frozen
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Fill ``out`` with the teacher's trajectories; shards from an earlier call are kept.

    Several processes, each of which calls this, sample every so many-th shard.

    Args:
        overwrite: delete a cache that is in ``out``.
        teacher, prompts: the recipe's teacher and training prompts, if they are loaded already.
        device: where the teacher is loaded otherwise.
        process: this one among those that call. barrier: waits for all of them.

    Raises:
        UserError: another cache or other files in ``out``, another process that fills it, or a mistake in the recipe.
    """
    prompts = open_prompts(recipe.prompts).texts("train") if prompts is None else prompts
    if teacher is None:
        with _claimed(out, process):
            check_cache_folder(out, overwrite)
            teacher = load(recipe.teacher, device)
            teacher.set_size(recipe.resolution, recipe.frames)
            if recipe.precision == "bf16":
                warn_if_emulated("precision bf16", teacher.device, "precision: auto, or fp32")
            return make_cache(
                *(recipe, out),
                overwrite=overwrite,
                teacher=teacher,
                prompts=prompts,
                process=process,
                barrier=barrier,
            )
    guidance = teacher.generation_config.guidance_scale if recipe.guidance_scale is None else recipe.guidance_scale
    anchors = flow.uniform_timesteps(recipe.steps)
    made_by = cache_fingerprint(teacher, anchors, recipe.teacher_steps_per_student_step, guidance)
    index = Index(made_by, recipe.num_trajectories, recipe.shard_size, recipe.first_seed)
    if not overwrite and is_complete(out, index):
        return out  # without a lock: several processes read it at once
    with _claimed(out, process):
        if process.rank == 0:
            if overwrite and (out / INDEX).exists():
                delete_cache(out)
            write_index(out, index)
        barrier()
        own = range(process.rank, index.shards, process.world_size)
        missing = [shard for shard in own if not shard_file(out, shard).exists()]
        shards = track(missing, "the teacher's trajectories") if process.rank == 0 else missing
        _fill(recipe, out, index, shards, teacher, anchors, guidance, encodable(teacher, prompts))
        barrier()
    return out


def _claimed(out: Path, process: Shard) -> AbstractContextManager[None]:
    """The first of several processes locks the folder for all."""
    return claimed_folder(out) if process.rank == 0 else nullcontext()


def _fill(
    recipe: CacheRecipe,
    out: Path,
    index: Index,
    shards: Iterable[int],
    teacher: TextToImagePipeline,
    anchors: list[float],
    guidance: float,
    texts: EncodableTexts,
) -> None:
    """Sample these shards."""
    device, substeps = teacher.device, recipe.teacher_steps_per_student_step
    denoiser: Denoiser = teacher.denoiser
    if guidance > 0:
        denoiser = ClassifierFreeGuidance(teacher.denoiser, teacher.encode([""]), 1 + guidance)
    size = teacher.generation_config.size
    together = recipe.batch_size or max_batch_size(*size)
    for shard in shards:
        samples = index.sample_range(shard)
        seeds = index.seeds(samples)
        chosen = [_draw_prompt(seed, len(texts)) for seed in seeds]
        encoded, states = texts.encoded(chosen), []
        for part in batched(len(samples), together):
            noise, prompts = initial_noise(teacher, seeds[part], *size), encoded[part].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe.precision, device)):
                found = teacher_trajectory(denoiser, noise, anchors, substeps, teacher.shift, prompts)
            states.append(found.half().cpu())  # as they are stored
        kept = EncodedPrompts(encoded.features.to(teacher.text_encoder.dtype), encoded.lengths)
        write_shard(shard_file(out, shard), torch.cat(states), kept, [texts[i] for i in chosen])


def open_trajectory_cache(
    recipe: DistillRecipe, teacher: TextToImagePipeline, folder: Path, prompts: TrainingPrompts
) -> TrajectoryCache:
    """The teacher's trajectories for a distillation: the recipe's cache, or one made in ``folder`` of training prompts.

    Raises:
        UserError: the recipe's cache is of another teacher or schedule, or incomplete, or has prompts that the recipe
            holds out.
    """
    settings, steps = recipe.trajectory, recipe.student.trajectory_steps
    guidance = settings.guidance_scale
    if guidance is None:
        guidance = teacher.generation_config.guidance_scale
    substeps = settings.teacher_steps_per_student_step
    made_by = cache_fingerprint(teacher, flow.uniform_timesteps(steps), substeps, guidance)
    if settings.cache is not None:
        found, source = TrajectoryCache(settings.cache, made_by), open_prompts(recipe.prompts)
        check_held_out({settings.cache: found.texts()}, source.texts("validation"), source.texts("test"))
        return found
    return TrajectoryCache(fill_trajectory_cache(recipe, teacher, folder, prompts), made_by)


def fill_trajectory_cache(
    recipe: DistillRecipe,
    teacher: TextToImagePipeline,
    folder: Path,
    prompts: TrainingPrompts,
    process: Shard = Shard(),  # noqa: B008  # frozen
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Sample the teacher's trajectories for a distillation in ``folder``, as :func:`make_cache` does.

    Raises:
        UserError: as there, and for a stream of prompts.
    """
    settings = recipe.trajectory
    cache = CacheRecipe(
        kind="cache_trajectories",
        name=recipe.name,
        teacher=recipe.teacher,
        prompts=recipe.prompts,
        steps=recipe.student.trajectory_steps,
        teacher_steps_per_student_step=settings.teacher_steps_per_student_step,
        guidance_scale=settings.guidance_scale,
        num_trajectories=settings.num_trajectories,
        shard_size=64,  # an interruption loses few of them
        precision=recipe.train.precision,
    )
    return make_cache(cache, folder, teacher=teacher, prompts=listed(prompts), process=process, barrier=barrier)


def teacher_batches(cache: TrajectoryCache, teacher: TextToImagePipeline, size: int, seed: int) -> BatchSource:
    """Batches of ``size`` cached trajectories: noise, prompts and the teacher's states."""

    def source(position: int, shard: Shard = Shard()) -> DistillBatch:  # noqa: B008  # frozen
        drawn = torch.randint(len(cache), (size,), generator=generator("trajectories", seed, position))
        chosen = drawn[shard.rows(size)].tolist()
        states, prompts = cache.read(chosen)
        noise = initial_noise(teacher, cache.seeds(chosen), *teacher.generation_config.size)
        return DistillBatch(noise, prompts.to(teacher.device), states.to(teacher.device), cache.texts_of(chosen))

    return source


def _draw_prompt(seed: int, count: int) -> int:
    """The prompt of a sample, from its own seed: a longer cache starts with the samples of a shorter one."""
    return int(torch.randint(count, (), generator=generator("prompt", seed)))
