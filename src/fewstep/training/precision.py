"""The precision of a run: "auto" is decided once, when the run starts, and written into its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fewstep.config.load import read_yaml
from fewstep.config.recipe import DistillRecipe, Recipe, Stage, StagesRecipe, TrainingRecipe
from fewstep.core.precision import uses_bf16, warn_if_emulated
from fewstep.training.distributed import DistContext

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def resolve_precision(
    recipe: AnyRecipe, directory: str | Path, dist: DistContext | None = None, *, overwrite: bool = False
) -> AnyRecipe:
    """A copy of a recipe in which ``train.precision: auto`` is the precision that the run in ``directory`` has, or
    else the one that this device is faster with. A run that is resumed on another machine keeps its precision.

    Warns where losses will run in bf16 that the device only emulates.

    Args:
        overwrite: the run in the directory will be deleted.
    """
    dist = dist or DistContext()
    file = Path(directory) / "recipe.yaml"
    saved = read_yaml(file) if file.exists() and not overwrite else {}
    resolved = recipe.model_copy(deep=True)
    for number, training in enumerate(_trainings(resolved)):
        train = training.train
        if train.precision == "auto":
            bf16 = uses_bf16("auto", dist.device)
            train.precision = _saved_precision(saved, number) or ("bf16" if bf16 else "fp32")
        if train.precision == "bf16" and dist.is_main_process:
            warn_if_emulated("train.precision bf16", dist.device, "train.precision: auto, or fp32")
    return resolved


def _trainings(recipe: Recipe) -> Sequence[Stage | TrainingRecipe]:
    if isinstance(recipe, StagesRecipe):
        return recipe.stages
    return [recipe] if isinstance(recipe, DistillRecipe | TrainingRecipe) else []


def _saved_precision(saved: Mapping[str, Any], number: int) -> Any:
    """The precision in a saved recipe; "auto" where an earlier version wrote it."""
    stages = saved.get("stages")
    section = saved if stages is None else stages[number] if number < len(stages) else {}
    return section.get("train", {}).get("precision")
