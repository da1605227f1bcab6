"""Several distillations in a row: each phase's student starts from the last one's."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.config.recipe import DistillRecipe, Stage, StagesRecipe
from fewstep.config.sections import EvaluateSettings
from fewstep.jobs import Validator, distill
from fewstep.training.distributed import DistContext, open_run
from fewstep.training.malloc import malloc_trim
from fewstep.training.run_dir import RunDir
from fewstep.training.tracking import read_metrics


def shared_trajectory_cache(phase: Stage, phases: Sequence[Stage]) -> str:
    """The name of the first phase that asks the teacher the same: those that do share its answers."""

    def asked(one: Stage) -> tuple[object, ...]:
        return one.prompts, one.size, one.trajectory, one.student.steps, one.student.anchors, one.train.precision

    return next(one.name for one in phases if asked(one) == asked(phase))


def stage_recipe(recipe: StagesRecipe, phase: Stage, init: Path | None = None) -> DistillRecipe:
    """A phase as a recipe of its own, from another student."""
    return DistillRecipe(
        **phase.model_dump(),
        kind="distill",
        teacher=recipe.teacher,
        init=None if init is None else str(init),
        evaluate=EvaluateSettings(enabled=False, every=recipe.evaluate.every, watched=recipe.evaluate.watched),
    )


def free_memory() -> None:
    """Frees what the last phase's models still hold: they refer to each other in circles, and the next one's need the
    room."""
    gc.collect()
    malloc_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _linked(source: str, target: str) -> None:
    """A file that is there twice and takes its space once, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_stages(
    recipe: StagesRecipe, run: RunDir, watch: Validator | None = None, dist: DistContext | None = None
) -> Path:
    """Run the phases in order, each in ``<run>/phases/<number>-<name>``; the last student goes to ``<run>/student``,
    and their metrics in a row to ``<run>/metrics.jsonl``.

    Phases that are done are passed over, and one that was interrupted goes on.
    """
    dist = dist or DistContext()
    student: Path | None = None
    lines: list[dict[str, float]] = []
    for number, phase in enumerate(recipe.stages, start=1):
        folder = run.directory / "phases" / f"{number}-{phase.name}"
        one = stage_recipe(recipe, phase, student)
        with open_run(dist, folder, one, resume_command=run.resume_command) as inner:
            student = distill(
                one, inner, watch, dist, run.directory / "cache" / shared_trajectory_cache(phase, recipe.stages)
            )
        free_memory()
        before = lines[-1]["step"] if lines else 0
        lines += [{**line, "step": before + line["step"]} for line in read_metrics(folder / "metrics.jsonl")]
    assert student is not None  # the schema asks for at least one phase
    target = run.directory / "student"
    if not dist.is_main_process:
        return target
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    aside = target.with_name(".student.draft")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(student, aside, copy_function=_linked)
    shutil.rmtree(target, ignore_errors=True)
    return aside.rename(target)
