"""What a recipe of each kind contains; its sections are in ``sections``, the method's in the method's own file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from fewstep.config.base import NAME, BatchSize, Frames, GuidanceScale, Pixels, Seed, Settings, Updates
from fewstep.config.method import VALIDATION, MethodConfig, method_union
from fewstep.config.sections import (
    EvaluateSettings,
    ModelsSettings,
    OptimSettings,
    PromptSettings,
    TrainSettings,
    TrajectorySettings,
    check_optimizers,
)
from fewstep.config.student import StudentSettings
from fewstep.core.registry import recipe_kinds


class Recipe(Settings):
    """Base of all recipes; ``kind`` says which one a file holds."""

    kind: str
    name: str = Field(pattern=NAME, description="Name of the run; its directory is runs/<name>.")

    @classmethod
    def validation_model(cls) -> type[Self]:
        """The pydantic model that a file is checked against."""
        return cls


class TrainingRecipe(Recipe):
    """Base of recipes that are one training."""

    train: TrainSettings = Field(description="Length, batches, cadence.")

    @model_validator(mode="after")
    def _check_optimizers(self) -> Self:
        optimizers = {key: value for key, value in self if isinstance(value, OptimSettings)}
        check_optimizers(optimizers)
        return self


class Stage(Settings):
    """One training of a student: a recipe's only one, or one of several in a row."""

    name: str = Field(pattern=NAME, description="Name of the run, or of the stage.")
    student: StudentSettings = Field(default_factory=StudentSettings, description="The student's steps.")
    method: MethodConfig = Field(description="The method; its keys depend on method.name.")
    prompts: PromptSettings = Field(default_factory=PromptSettings, description="Prompts to train on.")
    resolution: Pixels | None = Field(
        None, description="Pixels of a side in training, and of the student; null is the teacher's."
    )
    frames: Frames | None = Field(
        None, description="Frames of a video in training, and of the student's; null is the teacher's, 1 an image."
    )
    models: ModelsSettings = Field(default_factory=ModelsSettings, description="Full copies, or LoRA on one base.")
    trajectory: TrajectorySettings = Field(
        default_factory=TrajectorySettings, description="The teacher's trajectories, where the method uses them."
    )
    optim: dict[str, OptimSettings] = Field(description="Optimizers by trainable part.")
    train: TrainSettings = Field(description="Length, batches, cadence.")

    @model_validator(mode="before")
    @classmethod
    def _drop_optimizers_set_to_null(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("optim"), dict):
            return tree | {"optim": {part: value for part, value in tree["optim"].items() if value is not None}}
        return tree

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        parts = self.method.trainable_parts()
        missing = [part for part in parts if part not in self.optim]
        unknown = [part for part in self.optim if part not in parts]
        if missing:
            raise ValueError(f"optim.{missing[0]} is missing: method {self.method.name} trains {', '.join(parts)}")
        if unknown:
            raise ValueError(
                f"optim.{unknown[0]}: method {self.method.name} has no such trainable part here (it trains "
                f"{', '.join(parts)})"
            )
        check_optimizers({f"optim.{part}": settings for part, settings in self.optim.items()})
        student = self.student
        if self.models.lora_per_step and (student.step_counts is not None or student.timestep_sampling != "fixed"):
            raise ValueError(
                "models.lora_per_step: the student's steps must be fixed; leave out student.step_counts and "
                "student.timestep_sampling"
            )
        self.method.check(self)
        if self.prompts.stream is not None and self.method.samples_teacher and self.trajectory.cache is None:
            raise ValueError(
                f"prompts.stream: method {self.method.name} samples the teacher's trajectories here, for a list of "
                "prompts; name a cache in trajectory.cache, or set prompts.stream=null"
            )
        if self.train.keep_best is not None:
            for metric in (self.train.keep_best.metric, *self.train.keep_best.at_least):
                self.method.check_metric(metric, self)
        return self


def check_validated(stage: Stage, evaluate: EvaluateSettings) -> None:
    """Raises: ValueError if the best checkpoint is chosen by a metric of validation, and there is none."""
    best = stage.train.keep_best
    for metric in () if best is None or evaluate.validate_every else (best.metric, *best.at_least):
        if metric.startswith(VALIDATION):
            raise ValueError(f"train.keep_best.metric {metric}: never measured; set evaluate.validate_every")


class DistillRecipe(Stage, Recipe):
    """One distillation."""

    kind: Literal["distill"] = Field(description="Makes a few-step student of a teacher.")
    teacher: str = Field(description='Folder or hub id of the teacher, or the name of a bundled one ("micro").')
    init: str | None = Field(None, description="Model whose weights the student starts from; null is the teacher.")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="Validation and final report.")

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        check_validated(self, self.evaluate)
        return self

    @classmethod
    def validation_model(cls) -> type[Self]:
        return create_model(cls.__name__, __base__=cls, __module__=__name__, method=method_union())


class StagesRecipe(Recipe):
    """Several distillations in a row."""

    kind: Literal["stages"] = Field(description="Several distillations in a row, each from the last one's student.")
    teacher: str = Field(description='Folder or hub id of the teacher, or the name of a bundled one ("micro").')
    stages: list[Stage] = Field(min_length=1, description="The distillations, in order; their names are their folders.")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="Validation and final report.")

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        for stage in self.stages:
            check_validated(stage, self.evaluate)
        return self

    @classmethod
    def validation_model(cls) -> type[Self]:
        stage = create_model("Stage", __base__=Stage, __module__=__name__, method=method_union())
        stages = Annotated[list[stage], Field(min_length=1, description=cls.model_fields["stages"].description)]  # type: ignore[valid-type]
        return create_model(cls.__name__, __base__=cls, __module__=__name__, stages=stages)


class CacheRecipe(Recipe):
    """A teacher's trajectories on disk."""

    kind: Literal["cache_trajectories"] = Field(description="Keeps a teacher's trajectories on disk.")
    teacher: str = Field(description='Folder or hub id of the teacher, or the name of a bundled one ("micro").')
    prompts: PromptSettings = Field(default_factory=PromptSettings, description="Prompts to draw from.")
    resolution: Pixels | None = Field(None, description="Pixels of a side; null is the teacher's.")
    frames: Frames | None = Field(None, description="Frames of a video; null is the teacher's, 1 an image.")
    steps: int = Field(default=4, ge=1, le=64, description="The student's steps: one state is kept for each.")
    teacher_steps_per_student_step: Updates = Field(default=12, description="Teacher steps per student step.")
    guidance_scale: GuidanceScale | None = Field(
        None, description="The teacher's guidance; null is its generation config's."
    )
    num_trajectories: int = Field(ge=1, le=10**9, description="How many trajectories.")
    shard_size: int = Field(default=256, ge=1, le=1_000_000, description="Trajectories in a file.")
    first_seed: Seed = Field(default=1_000_000, description="Sample i starts from seed first_seed + i.")
    batch_size: BatchSize | None = Field(
        None, description="Trajectories that are sampled together; null fits two million pixels, at most 64."
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="auto", description="bf16: the teacher runs under autocast; auto: where the device is faster with it."
    )


def flat_recipe(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested recipe by dotted key, as in ``stages.0.train.steps``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        flat |= flat_recipe(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


recipe_kinds.register("distill", DistillRecipe)
recipe_kinds.register("stages", StagesRecipe)
recipe_kinds.register("cache_trajectories", CacheRecipe)
recipe_kinds.register("lora", "fewstep.config.lora_recipe:LoraRecipe")
