"""The Python API: four functions. The command line is a thin layer over them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.config.load import load_recipe, with_overrides, wrong_kind
from fewstep.config.recipe import DistillRecipe, Recipe, Stage, StagesRecipe
from fewstep.core.device import AUTO, parse_device
from fewstep.data.prompts import open_prompts
from fewstep.errors import UserError
from fewstep.evaluation.kept_images import PUBLISHED
from fewstep.evaluation.metrics_file import Metrics
from fewstep.evaluation.prompts import planned_evaluation, read_test_prompts
from fewstep.evaluation.run_checks import (
    check_best_metric,
    check_evaluation,
    check_named_files,
    check_training_prompts,
)
from fewstep.evaluation.runner import evaluate as _evaluate
from fewstep.evaluation.validation import Validator
from fewstep.inference.generate import Callback, GenerationResult
from fewstep.inference.generate import generate as _generate
from fewstep.inference.params import parse_params
from fewstep.jobs import distill as _distill
from fewstep.models.components import resolve_model
from fewstep.models.fingerprint import recipe_fingerprints
from fewstep.models.generation_config import load_generation_config
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.progress import log_line
from fewstep.stages import free_memory, run_stages
from fewstep.training.distributed import init_distributed, open_run
from fewstep.training.precision import resolve_precision

__all__ = ["DistillResult", "distill", "evaluate", "generate", "load"]


@dataclass(frozen=True)
class DistillResult:
    """What a distillation leaves.

    Attributes:
        student: its folder, which ``fewstep.load`` and diffusers open.
        metrics: the evaluation beside the teacher; None where ``evaluate.enabled`` is false.
        report: the page that shows it, likewise.
    """

    student: Path
    metrics: Metrics | None = None
    report: Path | None = None


def distill(
    recipe: str | Path | DistillRecipe | StagesRecipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    device: str | torch.device = AUTO,
) -> DistillResult:
    """Distill a teacher into a few-step student; a second call resumes from the last checkpoint.

    Args:
        recipe: a YAML file, the name of a bundled recipe, or a recipe in memory.
        out: the run's directory; ``runs/<the recipe's name>`` by default.
        overrides: fields to change, as ``"train.steps=100"``.
        overwrite: delete what an earlier run left in the directory.
        device: where training and evaluation compute; "auto" is the GPU where there is one, else the CPU.

    Raises:
        UserError: a mistake in the recipe or the directory, or there is no such device.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint was saved; its text has the command that resumes.
    """
    if isinstance(recipe, Recipe):
        resolved = with_overrides(recipe, overrides) if overrides else recipe
    else:
        resolved = load_recipe(recipe, overrides)
    if not isinstance(resolved, DistillRecipe | StagesRecipe):
        raise wrong_kind(resolved, resolved.name if isinstance(recipe, Recipe) else recipe)
    directory = out or Path("runs") / resolved.name
    settings = resolved.evaluate
    stage: Stage = resolved if isinstance(resolved, DistillRecipe) else resolved.stages[-1]
    source = open_prompts(stage.prompts)
    check_training_prompts(resolved, source)
    validation = list(source.texts("validation")[: settings.validation_prompts])
    test = list(source.texts("test")[: settings.num_prompts])
    check_named_files(resolved)
    check_evaluation(settings, stage.prompts.source, validation, test)
    stages: Sequence[Stage] = [resolved] if isinstance(resolved, DistillRecipe) else resolved.stages
    trained = [found for each in stages if (found := each.method.trained_rewards()) is not None]
    rewards = {name: weight for found in trained for name, weight in found.items()} if trained else None
    for each in stages:
        check_best_metric(each, validation, settings, rewards)
    validator = Validator.of(validation, settings, rewards)
    with ExitStack() as stack:
        dist = stack.enter_context(init_distributed(device))
        if settings.enabled and dist.is_main_process:
            log_line(f"after the training: {planned_evaluation(stage, settings, len(test))}")
        resolved = resolve_precision(resolved, directory, dist, overwrite=overwrite)
        options: dict[str, Any] = {"overwrite": overwrite, "fingerprints": recipe_fingerprints(resolved)}
        run = stack.enter_context(open_run(dist, directory, resolved, **options))
        if isinstance(resolved, DistillRecipe):
            student = _distill(resolved, run, validator, dist)
        else:
            student = run_stages(resolved, run, validator, dist)
        if not settings.enabled or not dist.is_main_process:
            return DistillResult(student)
        report, curves = run.directory / "report", run.directory / "metrics.jsonl"
        free_memory()
        try:
            made = load(student, dist.device, offload="model")
            others = {"teacher": resolved.teacher} | settings.compare
            opened = {
                label: load(path, dist.device, made.transformer.dtype, offload="model")
                for label, path in others.items()
            }
            metrics = evaluate(
                made,
                test,
                teacher=opened.pop("teacher"),
                compare=opened,
                scorers=settings.scorers,
                features=settings.features,
                max_minutes=settings.max_minutes,
                out=report,
                curves=curves if curves.exists() else None,
                published=resolve_model(resolved.teacher) / PUBLISHED,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the student is saved but not evaluated; resume with: {run.resume_command}"
            ) from None
    return DistillResult(student, metrics, report / "index.html")


def generate(
    model: str | Path | TextToImagePipeline,
    prompts: str | Sequence[str],
    *,
    callback: Callback | None = None,
    device: str | torch.device = AUTO,
    **options: Any,
) -> GenerationResult:
    """Generate one image for each prompt.

    Args:
        device: where a model that is given by its path or name is loaded; a pipeline is used where it is.
        callback: called after every step; it can cancel, see :func:`fewstep.inference.generate.generate`.
        options: fields of :class:`fewstep.inference.params.SamplingParams` (seed, steps, guidance_scale, ...).

    >>> fewstep.generate("micro", "a noto emoji of a red apple on a blue background", seed=1).images.shape
    torch.Size([1, 64, 64, 3])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return _generate(_loaded(model, device), texts, parse_params(options), callback)


def evaluate(
    model: str | Path | TextToImagePipeline,
    prompts: str | Path | Sequence[str] | None = None,
    *,
    num_prompts: int = 200,
    teacher: str | Path | TextToImagePipeline | None = None,
    compare: Mapping[str, str | Path | TextToImagePipeline] | None = None,
    out: str | Path | None = None,
    device: str | torch.device = AUTO,
    **options: Any,
) -> Metrics:
    """Measure a model on fixed prompts and seeds, beside its teacher where there is one.

    Args:
        prompts: a list of prompts; or the name of a prompt source or a folder of encoded prompts, whose test prompts
            are used; or any other source of :func:`fewstep.data.prompt_files.read_texts`, which is used whole. By
            default, the test prompts of the run that made the model; those of the emoji dataset for bundled models.
        num_prompts: the number of prompts, the first ones, from a source, folder or file. A list is used whole.
        teacher: by default the one in the model's generation config. It is loaded on the model's device and in its
            dtype; a pipeline must be on the model's device.
        compare: further models in the report, by label; loaded as the teacher is.
        device: as for :func:`generate`.
        out: folder of metrics.json and index.html; nothing is written by default.
        options: as in :func:`fewstep.evaluation.runner.evaluate`.

    Raises:
        UserError: a mistake in the options, or prompts that cannot be read.
    """
    if prompts is None or isinstance(prompts, str | Path):
        prompts = read_test_prompts(prompts, num_prompts, model=model)
    teacher = find_teacher(model, teacher)
    texts, measured = list(prompts), _loaded(model, device)
    if teacher is not None and not isinstance(teacher, TextToImagePipeline):
        options = {"published": teacher / PUBLISHED} | options
        teacher = load(teacher, measured.device, measured.transformer.dtype)
    others = {
        label: each
        if isinstance(each, TextToImagePipeline)
        else load(each, measured.device, measured.transformer.dtype)
        for label, each in (compare or {}).items()
    }
    return _evaluate(measured, prompts=texts, teacher=teacher, compare=others, out=out, **options)


def find_teacher(
    model: str | Path | TextToImagePipeline, teacher: str | Path | TextToImagePipeline | None
) -> Path | TextToImagePipeline | None:
    """The teacher that a model is measured beside: the given one, else the one in its generation config.

    Raises:
        UserError: there is no such model or teacher. Nothing is loaded to find that out.
    """
    if isinstance(teacher, TextToImagePipeline):
        return teacher
    if teacher is not None:
        return resolve_model(teacher)
    if isinstance(model, TextToImagePipeline):
        config = model.generation_config
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loading the model gives them again
            config = load_generation_config(resolve_model(model))
    if config.teacher is None:
        return None
    try:
        return resolve_model(config.teacher)
    except UserError as error:
        raise UserError(f"the model's teacher, as in its fewstep.json, cannot be opened: {error}") from None


def _loaded(model: str | Path | TextToImagePipeline, device: str | torch.device) -> TextToImagePipeline:
    if not isinstance(model, TextToImagePipeline):
        return load(model, device)
    wanted = model.device if device == AUTO else parse_device(device)
    if wanted.type != model.device.type or wanted.index not in (None, model.device.index):
        raise UserError(f"device {device}: the model is on {model.device}; load or move it there, or leave device out")
    return model
