"""What a distillation's prompts and evaluation need, checked before its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fewstep.config.method import VALIDATION
from fewstep.config.recipe import DistillRecipe, Stage, StagesRecipe
from fewstep.config.sections import EvaluateSettings
from fewstep.data.prompt_text import comparison_key
from fewstep.data.prompts import PromptSource, StreamPrompts, check_held_out, checked_prompts, open_prompts
from fewstep.errors import UserError
from fewstep.evaluation.applicability import check_applicable
from fewstep.evaluation.feature_networks import open_features
from fewstep.evaluation.runner import report_writer
from fewstep.evaluation.validation import validation_metrics
from fewstep.models.components import resolve_model
from fewstep.rewards.scorers import open_scorers


def check_training_prompts(recipe: DistillRecipe | StagesRecipe, last: PromptSource) -> None:
    """Raises: UserError if any stage trains on the prompts that the run is measured on."""
    sources = {"prompts": last}
    if isinstance(recipe, StagesRecipe):
        sources = {f"stage {one.name}, prompts": open_prompts(one.prompts) for one in recipe.stages}
    measured = [*last.texts("validation"), *last.texts("test")]
    for where, source in sources.items():
        if isinstance(source, StreamPrompts) and not source.train.leaves_out(measured):
            raise UserError(
                f"{where}: this stream does not leave out the last stage's validation and test prompts; set "
                "prompts.validation_source and prompts.test_source as there"
            )
    for one in recipe.stages if isinstance(recipe, StagesRecipe) else []:
        own = sources[f"stage {one.name}, prompts"]
        left_out = {comparison_key(text) for split in ("validation", "test") for text in own.texts(split)}
        if one.method.streams_real and not left_out.issuperset(map(comparison_key, measured)):
            raise UserError(
                f"stage {one.name}, method.real_source: these samples may have the last stage's validation and test "
                "prompts; set prompts of this stage as there"
            )
    training = {where: checked_prompts(source) for where, source in sources.items()}
    for one in recipe.stages if isinstance(recipe, StagesRecipe) else [recipe]:
        training |= one.method.further_prompts()
    check_held_out(training, last.texts("validation"), last.texts("test"))


def check_named_files(recipe: DistillRecipe | StagesRecipe) -> None:
    """Raises: UserError if a model or reward that the run needs besides the teacher is not there."""
    compared = recipe.evaluate.compare if recipe.evaluate.enabled else {}
    named = {f"evaluate.compare.{label}": path for label, path in compared.items()}
    if isinstance(recipe, DistillRecipe) and recipe.init is not None:
        named = {"init": recipe.init} | named
    for key, path in named.items():
        try:
            resolve_model(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    for stage in recipe.stages if isinstance(recipe, StagesRecipe) else [recipe]:
        stage.method.check_files()


def check_evaluation(settings: EvaluateSettings, source: str, validation: Sequence[str], test: Sequence[str]) -> None:
    """Find the mistakes that would otherwise stop a run at its first validation, or at its report after the training.

    Raises:
        UserError: too few prompts, a scorer or feature network that cannot be opened, or a package that is missing.
    """
    if settings.enabled and len(test) < 2:
        raise UserError(
            f"prompts.source={source}: {len(test)} test prompts with evaluate.num_prompts={settings.num_prompts}, at "
            "least 2 are needed; name a file in prompts.test_source, or set evaluate.enabled=false"
        )
    if settings.validate_every and not validation:
        raise UserError(
            f"prompts.source={source}: no validation prompts; name a file in prompts.validation_source, or set "
            "evaluate.validate_every=0"
        )
    if settings.enabled or settings.validate_every:
        opened = open_scorers(settings.scorers)
        if settings.scorers is not None:
            check_applicable(opened, [*test] if settings.enabled else [*validation])
    if settings.enabled:
        open_features(settings.features)
        report_writer()


def check_best_metric(
    stage: Stage, validation: Sequence[str], settings: EvaluateSettings, rewards: Mapping[str, float] | None
) -> None:
    """Raises: UserError if the best checkpoint is chosen by a score that validation does not have."""
    best = stage.train.keep_best
    wanted = [] if best is None else [name for name in (best.metric, *best.at_least) if name.startswith(VALIDATION)]
    known = validation_metrics(validation, settings.scorers, rewards, settings.features) if wanted else []
    for name in wanted:
        if name not in known:
            raise UserError(
                f"train.keep_best.metric: there is no {name!r} with these scorers and validation prompts; there are "
                + ", ".join(known)
            )
