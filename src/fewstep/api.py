"""The Python API: four functions. The command line is a thin layer over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe, StagesRecipe
from fewstep.errors import UserError
from fewstep.evaluation.metrics_file import Metrics
from fewstep.evaluation.runner import emoji_prompts
from fewstep.evaluation.runner import evaluate as _evaluate
from fewstep.evaluation.validation import make_validator
from fewstep.inference.generate import Callback, GenerationResult
from fewstep.inference.generate import generate as _generate
from fewstep.inference.params import parse_params
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.training.distributed import init_distributed, open_run

__all__ = ["Distilled", "distill", "evaluate", "generate", "load"]


@dataclass(frozen=True)
class Distilled:
    """What a distillation leaves.

    Attributes:
        student: its folder, which ``fewstep.load`` and ``diffusers.ZImagePipeline.from_pretrained`` open.
        metrics: the evaluation beside the teacher; None where the recipe says ``evaluate.enabled: false``.
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
) -> Distilled:
    """Make a few-step student of a teacher; called again, it goes on from the last checkpoint.

    Args:
        recipe: a YAML file, the name of a shipped recipe, or a recipe in memory.
        out: the run's directory; ``runs/<the recipe's name>`` unless given.
        overrides: fields to change, as ``"train.steps=100"``.
        overwrite: start over: delete an earlier run's files in ``out``.

    Raises:
        UserError: a mistake in the recipe or the directory.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint was saved; its text says how to go on.
    """
    resolved = recipe if isinstance(recipe, DistillRecipe | StagesRecipe) else load_recipe(recipe, list(overrides))
    if not isinstance(resolved, DistillRecipe | StagesRecipe):
        command = {"cache_trajectories": "cache-trajectories"}.get(resolved.kind, "emoji train")
        raise UserError(f"{recipe}: its kind is {resolved.kind}; use: fewstep {command} {recipe}")
    directory = out or Path("runs") / resolved.name
    with init_distributed() as dist, open_run(dist, directory, resolved, fresh=overwrite) as run:
        watch = partial(make_validator, count=resolved.evaluate.validation_prompts)
        if resolved.kind == "distill":
            from fewstep.jobs import distill as distill_into

            student = distill_into(resolved, run, watch, dist)
        else:
            from fewstep.stages import run_stages

            student = run_stages(resolved, run, watch, dist)
        if not resolved.evaluate.enabled or not dist.is_main_process:
            return Distilled(student)
        report, curves = run.directory / "report", run.directory / "metrics.jsonl"
        try:
            metrics = evaluate(
                student,
                emoji_prompts(resolved.evaluate.num_prompts),
                teacher=resolved.teacher,
                out=report,
                curves=curves if curves.exists() else None,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the student is made, not yet evaluated; to go on: {run.resume_command}") from None
    return Distilled(student, metrics, report / "index.html")


def generate(
    model: str | Path | TextToImagePipeline,
    prompts: str | Sequence[str],
    *,
    callback: Callback | None = None,
    **options: Any,
) -> GenerationResult:
    """Generate one image for each prompt.

    Args:
        callback: called after every step, see :func:`fewstep.inference.generate.generate`; may cancel.
        options: fields of :class:`fewstep.inference.params.SamplingParams` (seed, steps, guidance_scale, ...).

    Raises:
        UserError: an unknown option, or a value that the model cannot take.
        GenerationCancelled: ``callback`` cancelled.

    >>> fewstep.generate("micro", "a noto emoji of a red apple on a blue background", seed=1).images.shape
    torch.Size([1, 64, 64, 3])
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    return _generate(_loaded(model), texts, parse_params(options), callback)


def evaluate(
    model: str | Path | TextToImagePipeline,
    prompts: Sequence[str] | None = None,
    *,
    teacher: str | Path | TextToImagePipeline | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Metrics:
    """Measure a model on fixed prompts and seeds, beside its teacher where there is one.

    Args:
        prompts: 200 held-out ones of the emoji world unless given.
        teacher: unset, the one that the model's card names.
        out: folder of metrics.json and index.html; nothing is written unless given.
        options: as in :func:`fewstep.evaluate.evaluate.evaluate`.
    """
    measured = _loaded(model)
    teacher = teacher if teacher is not None else measured.generation_config.teacher
    return _evaluate(
        measured,
        prompts=emoji_prompts(200) if prompts is None else prompts,
        teacher=None if teacher is None else _loaded(teacher),
        out=out,
        **options,
    )


def _loaded(model: str | Path | TextToImagePipeline) -> TextToImagePipeline:
    return model if isinstance(model, TextToImagePipeline) else load(model)
