"""The composition root: a recipe becomes models, data, a method and a trainer; the student is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from fewstep.config.recipe import DistillRecipe
from fewstep.core.device import log_device, resolve_device
from fewstep.core.registry import methods
from fewstep.data.encodable_texts import EncodableTexts
from fewstep.data.images import grid
from fewstep.data.prompt_stream import PromptStream, listed_or_first
from fewstep.data.prompts import open_prompts, training_prompts
from fewstep.data.teacher_trajectories import fill_trajectory_cache
from fewstep.data.text_prompts import encodable
from fewstep.inference.divided import Divided
from fewstep.inference.params import SamplingParams
from fewstep.methods.base import DataSetup, DistillMethod, MethodSetup
from fewstep.methods.models_setup import Models, build_models, check_models, check_processes
from fewstep.models.components import resolve_model
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.models.step_adapters import check_one_transformer
from fewstep.training.alerts import Rule
from fewstep.training.distributed import DistContext
from fewstep.training.run_dir import RunDir
from fewstep.training.trainer import Trainer

PREVIEW_IMAGES = 32


class Validator(Protocol):
    """Measures a student while it trains; see :class:`fewstep.evaluation.validation.Validator`."""

    @property
    def watches(self) -> bool:
        """Whether a reward is trained on, so that later values are compared with the start's."""
        ...

    def alert_rules(self) -> Sequence[Rule]:
        """Alarms on its metrics."""
        ...

    def __call__(
        self, student: TextToImagePipeline, teacher: TextToImagePipeline, divided: Divided
    ) -> Callable[[], Mapping[str, float]]:
        """A function that returns metrics of the student's present weights, measured by all processes together."""
        ...


@dataclass(frozen=True)
class Inputs:
    """What a distillation starts from. Distillations of one teacher and one list of prompts can share it.

    Attributes:
        teacher: frozen and whole.
        prompts: the training prompts: a stream, or a list, each encoded once for all that use them.
        validation: the validation prompts.
    """

    teacher: TextToImagePipeline
    prompts: EncodableTexts | PromptStream
    validation: Sequence[str]


def open_inputs(recipe: DistillRecipe, dist: DistContext, encoded: Path | None) -> Inputs:
    """The teacher and the prompts of a recipe. The test prompts are not among them.

    Args:
        encoded: folder for encoded prompts that do not fit into memory.
    """
    check_processes(recipe, dist.world_size)
    torch.manual_seed(recipe.train.seed)
    source = open_prompts(recipe.prompts)  # before the teacher is loaded: a mistake here is reported at once
    dtype = torch.float32 if recipe.models.frozen_dtype == "fp32" else torch.bfloat16
    check_one_transformer(resolve_model(recipe.teacher), "teacher")
    teacher = load(recipe.teacher, dist.device, dtype, offload="model")
    teacher.set_size(recipe.resolution, recipe.frames)
    check_models(recipe, teacher)
    if dist.is_main_process:
        log_device(dist.device)
    prompts = training_prompts(source)
    if isinstance(prompts, PromptStream):
        return Inputs(teacher, prompts, source.texts("validation"))
    with dist.main_process_first():
        return Inputs(teacher, encodable(teacher, prompts, encoded), source.texts("validation"))


def make_trainer(
    recipe: DistillRecipe,
    run: RunDir,
    inputs: Inputs,
    validator: Validator | None = None,
    dist: DistContext | None = None,
    cache: Path | None = None,
) -> tuple[Trainer, Models]:
    """The trainer of a recipe, and the models that it trains; with adapters, the teacher of ``inputs`` gets them.

    Arguments as for :func:`distill`.
    """
    dist = replace(dist or DistContext(), context_parallel=recipe.models.context_parallel)
    method_class: type[DistillMethod] = methods.get(recipe.method.name)
    torch.manual_seed(recipe.train.seed)
    trajectories = cache or run.directory / "cache"
    if dist.world_size > 1 and recipe.method.samples_teacher and recipe.trajectory.cache is None:
        fill_trajectory_cache(recipe, inputs.teacher, trajectories, inputs.prompts, dist.process, dist.barrier)
    with dist.main_process_first():
        data = DataSetup(recipe, inputs.teacher, inputs.prompts, trajectories)
        sources = method_class.batch_sources(data)
    models = build_models(recipe, inputs.teacher, recipe.method.extra_models(), dist, recipe.method.student_copies())
    setup = MethodSetup(recipe, models, inputs.teacher.encode([""]), sources, inputs.prompts, dist)
    method = method_class.build(setup)
    models.student.enable_model_cpu_offload()
    divided = Divided(dist.shard, dist.all_gather_rows)
    every = recipe.evaluate.validate_every if validator is not None else 0
    shown = inputs.validation or listed_or_first(inputs.prompts, PREVIEW_IMAGES, models.student.encoder)
    rules: list[Rule] = [*method_class.alert_rules, *(validator.alert_rules() if validator and every else ())]
    trainer = Trainer(
        method,
        sources["train"],
        run,
        train=recipe.train,
        optim=recipe.optim,
        preview=make_preview(models.student, shown[:PREVIEW_IMAGES], divided=divided),
        validate=validator(models.student, models.teacher, divided) if validator is not None and every else None,
        validate_every=every,
        validate_first=validator is not None and validator.watches,
        alert_rules=rules,
        dist=dist,
    )
    return trainer, models


def distill(
    recipe: DistillRecipe,
    run: RunDir,
    validator: Validator | None = None,
    dist: DistContext | None = None,
    cache: Path | None = None,
    encoded: Path | None = None,
) -> Path:
    """Distill, and save the student's moving average as ``<run>/student``, an ordinary diffusers folder; the best one
    by ``train.keep_best``, if it is not the last, as ``<run>/student-best``.

    Resumes from the run's last checkpoint. Returns the student's folder.

    Args:
        validator: measures the student every ``evaluate.validate_every`` steps.
        dist: the processes that train together; the main process writes.
        cache: folder of the teacher's trajectories; ``<run>/cache`` by default.
        encoded: folder for encoded prompts that do not fit into memory; ``<run>/encoded-prompts`` by default.
    """
    dist = dist or DistContext(device=resolve_device())
    inputs = open_inputs(recipe, dist, encoded or run.directory / "encoded-prompts")
    trainer, models = make_trainer(recipe, run, inputs, validator, dist, cache)
    trainer.fit()
    with trainer.ema_weights():
        student = models.save(run.directory / "student", dist)
    if trainer.load_best():
        with trainer.ema_weights():
            models.save(run.directory / "student-best", dist)
    return student


def make_preview(
    student: TextToImagePipeline,
    prompts: Sequence[str],
    params: SamplingParams | None = None,
    divided: Divided | None = None,
) -> Callable[[int], Image.Image]:
    """A function of the step that returns a grid of images: equal prompts and seeds, the student's present weights."""

    def preview(step: int) -> Image.Image:
        return grid((divided or Divided()).generate(student, prompts, params), columns=8)

    return preview
