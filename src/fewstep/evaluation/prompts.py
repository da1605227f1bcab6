"""The prompts that a model is measured on."""

from __future__ import annotations

from pathlib import Path

from fewstep.config.load import load_recipe
from fewstep.config.recipe import DistillRecipe, Stage, StagesRecipe
from fewstep.config.sections import EvaluateSettings, PromptSettings
from fewstep.core.registry import load_plugins, prompt_sources
from fewstep.data.prompt_files import read_prompts
from fewstep.data.prompt_shards import is_encoded
from fewstep.data.prompts import open_prompts
from fewstep.errors import UserError
from fewstep.evaluation.cost import evaluation_cost, nfe
from fewstep.evaluation.runner import DIVERSITY_PROMPTS, DIVERSITY_SEEDS
from fewstep.evaluation.settings import TEACHER_STEPS
from fewstep.models.components import BUNDLED_MODELS, resolve_model
from fewstep.models.generation_config import load_generation_config
from fewstep.models.pipeline import TextToImagePipeline


def read_test_prompts(
    source: str | Path | None, count: int, column: str = "prompt", *, model: str | Path | TextToImagePipeline = ""
) -> list[str]:
    """The first prompts of the test split of a prompt source or of encoded prompts, or of a file.

    Args:
        source: None is the one that a model was distilled with: that of the run whose folder it is in, and the emoji
            dataset's for bundled models and their students.
        model: which model, where ``source`` is None.

    Raises:
        UserError: the source cannot be read, or none is known.
    """
    load_plugins()
    if source is None:
        return list(open_prompts(_distilled_with(model)).texts("test")[:count])
    if str(source) in prompt_sources or is_encoded(source):
        return list(open_prompts(PromptSettings(source=str(source))).texts("test")[:count])
    return read_prompts(source, column)[:count]


def _distilled_with(model: str | Path | TextToImagePipeline) -> PromptSettings:
    if isinstance(model, TextToImagePipeline):
        known = str(model.generation_config.teacher)
    else:
        made_by = Path(model).parent / "recipe.yaml"
        recipe = load_recipe(made_by) if Path(model).is_dir() and made_by.is_file() else None
        if isinstance(recipe, DistillRecipe | StagesRecipe):
            return (recipe if isinstance(recipe, DistillRecipe) else recipe.stages[-1]).prompts
        bundled = str(model) in BUNDLED_MODELS
        known = str(model) if bundled else str(load_generation_config(resolve_model(model)).teacher)
    if known not in BUNDLED_MODELS:
        name = model if isinstance(model, str | Path) else "the model"
        raise UserError(f"{name}: no run with test prompts made it; name some: --prompts FILE, or --prompts emoji")
    return PromptSettings()


def planned_evaluation(stage: Stage, settings: EvaluateSettings, prompts: int) -> str:
    """What the evaluation after a distillation will measure, its cost, and how to change them."""
    few = stage.student.steps
    passes = [nfe(TEACHER_STEPS, True), nfe(few, False), nfe(few, True), nfe(few, False)]  # if the teacher is guided
    for path in settings.compare.values():
        config = load_generation_config(resolve_model(path))
        passes.append(nfe(config.steps, config.guidance_scale > 0))
    cost = evaluation_cost(prompts, passes, DIVERSITY_PROMPTS, DIVERSITY_SEEDS)
    limit = "no limit" if settings.max_minutes is None else f"at most about {settings.max_minutes:g} min"
    source = stage.prompts.test_source or stage.prompts.source
    return (
        f"evaluation on {prompts} test prompts of {source}, {cost.text}, {limit}; evaluate.num_prompts, "
        "evaluate.max_minutes and evaluate.enabled change that"
    )
