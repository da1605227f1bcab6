"""Several distillations in a row: each stage's student starts from the last one's."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep.atomic import atomic_folder, write_text
from fewstep.config.load import recipe_model
from fewstep.config.recipe import DistillRecipe, Stage, StagesRecipe
from fewstep.jobs import Validator, distill
from fewstep.models.fingerprint import recipe_fingerprints
from fewstep.models.generation_config import GENERATION_CONFIG, load_generation_config
from fewstep.training.distributed import DistContext, open_run
from fewstep.training.malloc import malloc_trim
from fewstep.training.run_dir import RunDir
from fewstep.training.tracking import read_metrics


def shared_trajectory_cache(stage: Stage, stages: Sequence[Stage]) -> str:
    """The name of the first stage that uses the same trajectories; such stages share a cache."""

    def cache_key(one: Stage) -> tuple[object, ...]:
        return one.prompts, one.resolution, one.frames, one.trajectory, one.student.levels, one.train.precision

    return next(one.name for one in stages if cache_key(one) == cache_key(stage))


def stage_recipe(recipe: StagesRecipe, stage: Stage, init: Path | None = None) -> DistillRecipe:
    """A stage as a recipe that can be run, starting from another student."""
    tree = stage.model_dump(mode="json") | {
        "kind": "distill",
        "teacher": recipe.teacher,
        "init": None if init is None else str(init),
        "evaluate": recipe.evaluate.model_dump(mode="json") | {"enabled": False},
    }
    found = recipe_model("distill").model_validate(tree)
    assert isinstance(found, DistillRecipe)
    return found


def free_memory() -> None:
    """Free the last stage's models, which hold references in cycles, before the next one's are made."""
    gc.collect()
    malloc_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system has them: the second student takes no space."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_stages(
    recipe: StagesRecipe, run: RunDir, validator: Validator | None = None, dist: DistContext | None = None
) -> Path:
    """Run the stages in order, each in ``<run>/stages/<number>-<name>``; the last student goes to ``<run>/student``,
    and the metrics of all to ``<run>/metrics.jsonl``.

    Finished stages are skipped, and an interrupted one resumes.
    """
    dist = dist or DistContext()
    student: Path | None = None
    lines: list[dict[str, float]] = []
    for number, stage in enumerate(recipe.stages, start=1):
        folder = run.directory / "stages" / f"{number}-{stage.name}"
        cache = run.directory / "cache" / shared_trajectory_cache(stage, recipe.stages)
        resolved = stage_recipe(recipe, stage, student)
        known = recipe_fingerprints(resolved)
        encoded = run.directory / "encoded-prompts"
        with open_run(dist, folder, resolved, fingerprints=known, resume_command=run.resume_command) as inner:
            student = distill(resolved, inner, validator, dist, cache, encoded)
        run.begin()
        free_memory()
        before = lines[-1]["step"] if lines else 0
        lines += [{**line, "step": before + line["step"]} for line in read_metrics(folder / "metrics.jsonl")]
    assert student is not None  # a recipe has at least one stage
    target = run.directory / "student"
    if not dist.is_main_process:
        return target
    write_text(run.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    with atomic_folder(target) as aside:
        shutil.copytree(student, aside, copy_function=_link_or_copy, dirs_exist_ok=True)
        # the path to the teacher differs from another folder
        write_text(aside / GENERATION_CONFIG, load_generation_config(student).dump(target))
    return target
