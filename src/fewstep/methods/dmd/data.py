"""Batch sources of DMD, and statistics of the teacher's samples."""

from __future__ import annotations

import math
from functools import partial

import torch

from fewstep.config.recipe import DistillRecipe
from fewstep.core import flow
from fewstep.core.batching import batched, max_batch_size
from fewstep.core.compiler import eager
from fewstep.core.guidance import ClassifierFreeGuidance
from fewstep.core.method import BatchSource, Shard
from fewstep.core.registry import loss_terms
from fewstep.core.samplers import sample_euler
from fewstep.data.image_batches import rendered_image_batches
from fewstep.data.prompt_batches import prompt_batches
from fewstep.data.prompt_stream import listed, listed_or_first
from fewstep.data.prompts import open_prompts
from fewstep.data.real_batches import RealBatches
from fewstep.data.real_stream import RealStream, open_real_stream
from fewstep.data.teacher_trajectories import open_trajectory_cache, teacher_batches
from fewstep.data.text_prompts import encodable
from fewstep.errors import UserError
from fewstep.methods.base import DataSetup, MethodSetup
from fewstep.methods.dmd import monitor
from fewstep.methods.dmd.adaptive_depth import step_depth
from fewstep.methods.dmd.config import DMDConfig
from fewstep.models.noise import initial_noise

REFERENCE_STEPS = 16  # of the teacher's samples that the student's latents are compared with


def dmd_sources(setup: DataSetup) -> dict[str, BatchSource]:
    """ "train": prompts alone, or real batches where a term needs them; "real": latents of images with their prompts,
    the teacher's, an image source's or those of shards, where any term uses them; and the terms' own."""
    recipe, config, train = setup.recipe, setup.recipe.method, setup.recipe.train
    assert isinstance(config, DMDConfig)
    sources: dict[str, BatchSource] = {}
    if not config.requires_real:  # first, because it encodes the prompts, and the other sources need some of them
        alone = not config.samples_teacher and not config.measures_real
        batches = _prompt_batches_used(recipe, config) if alone else None
        depth = None if recipe.student.step_chooser is None else partial(step_depth, recipe, setup.teacher.encoder)
        prompts = setup.prompts if depth is None else listed(setup.prompts)
        sources["train"] = prompt_batches(setup.teacher, prompts, train.batch_size, train.seed, batches, depth)
    elif recipe.student.step_chooser is not None:
        raise UserError(
            "student.step_chooser: a term needs real latents of each prompt, which are those of a cache; leave out "
            "the term, or student.step_chooser"
        )
    if config.samples_teacher:
        cache = open_trajectory_cache(recipe, setup.teacher, setup.cache, setup.prompts)
        sources["real"] = teacher_batches(cache, setup.teacher, train.batch_size, train.seed)
    elif config.streams_real:
        stream = _real_stream(setup, config)
        # a stream is read in order: what measures it and what trains on it each have one of their own
        measured, trained = (RealBatches(setup.teacher, stream, train.batch_size, train.seed) for _ in range(2))
        sources |= {"real": measured} | ({"train": trained} if config.requires_real else {})
    elif config.measures_real:
        sources["real"] = rendered_image_batches(
            *(config.real_source, setup.teacher, listed(setup.prompts)),
            *(config.num_real_images, train.batch_size, train.seed),
        )
    if config.requires_real:
        sources = {"train": sources["real"]} | sources
    for name, settings in config.terms.on.items():
        sources |= loss_terms.get(name).batch_sources(settings, setup)
    return sources


def _real_stream(setup: DataSetup, config: DMDConfig) -> RealStream:
    """The samples of shards, without the samples of the recipe's validation and test prompts."""
    recipe = setup.recipe
    prompts = open_prompts(recipe.prompts)
    held_out = [*prompts.texts("validation"), *prompts.texts("test")]
    return open_real_stream(setup.teacher, config.real_source, recipe.prompts.column, config.real_stream, held_out)


def _prompt_batches_used(recipe: DistillRecipe, config: DMDConfig) -> int:
    """Batches of a whole training; each update of a trained part has a new one."""
    updates = len(recipe.optim) - 1 + config.fake_score_updates
    return recipe.train.steps * recipe.train.gradient_accumulation_steps * updates


def check_whole_groups(batch_size: int, group_size: int, processes: int) -> None:
    """Check that each process has whole groups of its rows of a batch.

    Raises:
        UserError: a group would be divided.
    """
    if batch_size // processes % group_size:
        raise UserError(
            f"method.group_size {group_size}: {processes} processes have {batch_size // processes} samples of each "
            f"batch, which are no whole groups; set train.batch_size to a multiple of {processes * group_size}"
        )


def teacher_latent_stats(setup: MethodSetup) -> dict[str, float]:
    """``monitor.latent_stats`` of the guided teacher's samples: of cached ones where there are some, else of a few
    sampled here."""
    config, teacher = setup.recipe.method, setup.models.teacher
    assert isinstance(config, DMDConfig)
    if "real" in setup.sources and config.real_source == "teacher":
        latents = setup.sources["real"](0, Shard()).real
        return {name: float(value) for name, value in monitor.latent_stats(latents).items()}
    size = teacher.generation_config.size
    count = 16 if math.prod(size) <= 256**2 else 4  # large images have enough latents
    texts = encodable(teacher, listed_or_first(setup.prompts, count, teacher.encoder))
    prompts = texts.encoded([i * len(texts) // count for i in range(count)]).to(teacher.device)
    noise = initial_noise(teacher, range(count), *size)
    guidance_scale = teacher.generation_config.guidance_scale
    denoiser = ClassifierFreeGuidance(teacher.denoiser, teacher.encode([""]), 1 + guidance_scale)
    sigmas = flow.get_sigmas(REFERENCE_STEPS, teacher.shift)
    with torch.no_grad(), eager():
        parts = batched(count, max_batch_size(*size))
        latents = torch.cat([sample_euler(denoiser, noise[part], sigmas, prompts[part]) for part in parts])
    return {name: float(value) for name, value in monitor.latent_stats(latents).items()}
