"""What a recipe of each kind may say: its sections are in `settings`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fewstep.config.sections import (
    NAME,
    DistillOptimSettings,
    EvaluateSettings,
    Fraction,
    PromptSettings,
    RenoiseSettings,
    RolesSettings,
    Settings,
    ShieldSettings,
    SpearSettings,
    StudentSettings,
    TrainSettings,
    TrajectorySettings,
)
from fewstep.core.registry import recipe_kinds

# --- recipes ---------------------------------------------------------------------------------------------------------


class Recipe(Settings):
    """Base of all recipes; ``kind`` says which one a file holds."""

    kind: str
    name: str = Field(pattern=NAME, description="Name of the run; its directory is runs/<name>.")


class TrainingRecipe(Recipe):
    """Base of recipes that are one training."""

    train: TrainSettings = Field(description="Length, batches, cadence.")


# --- distillation ----------------------------------------------------------------------------------------------------


class Stage(Settings):
    """One training of a student: a recipe's only one, or one of several in a row."""

    name: str = Field(pattern=NAME, description="Name of the run; its directory is runs/<name>.")
    train: TrainSettings = Field(description="Length, batches, cadence.")

    method: Literal["dmd", "trajectory"] = Field(
        default="dmd", description="dmd: Decoupled-DMD; trajectory: regression on the teacher's own states."
    )
    prompts: PromptSettings = Field(default_factory=PromptSettings, description="Prompts to distil on.")
    size: int | None = Field(
        None, ge=1, description="Pixels of a side in training, and the student's own; null asks the teacher's card."
    )
    student: StudentSettings = Field(default_factory=StudentSettings, description="The student's schedule.")
    spear: SpearSettings = Field(default_factory=SpearSettings, description="The engine.")
    shield: ShieldSettings = Field(default_factory=ShieldSettings, description="The regulariser.")
    renoise: RenoiseSettings = Field(default_factory=RenoiseSettings, description="The renoise schedule.")
    roles: RolesSettings = Field(default_factory=RolesSettings, description="Full copies, or LoRA on one base.")
    compile: bool = Field(default=False, description="Compile the transformers' blocks; needs a C++ compiler on a CPU.")
    gradient_checkpointing: bool = Field(
        default=False, description="Run each block again in the backward pass instead of keeping what is inside it."
    )
    dmd_norm_eps: float = Field(default=0.1, gt=0, description="Lower bound of the per-sample normalisers.")
    fake_updates: int = Field(default=5, ge=1, description="Updates of the fake for each one of the student.")
    align: Fraction = Field(
        default=0.0, description="Share of the steps, the first, in which the student only follows the teacher's way."
    )
    fake_warmup: int = Field(
        default=0, ge=0, description="Steps that the fake learns in before spear and shield move the student."
    )
    fake_follow: Fraction = Field(
        default=0.0, description="Share by which the fake is pulled to the student after each step."
    )
    trajectory: TrajectorySettings = Field(
        default_factory=TrajectorySettings, description="The teacher's own way, where it is asked for."
    )
    optim: DistillOptimSettings = Field(description="Optimizers.")

    @property
    def asks_teacher_first(self) -> bool:
        """Whether the teacher's own way, or other latents that count as real, are wanted before training begins."""
        return self.method == "trajectory" or self.align > 0 or self.shield.others

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.align and self.shield.real != "teacher":
            raise ValueError("align follows the teacher's own way: set shield.real to teacher")
        if self.method != "dmd" or not self.shield.enabled:
            return self
        if self.shield.weight and self.optim.fake is None:
            raise ValueError("optim.fake is missing: the fake of distribution matching needs an optimizer")
        if self.shield.regression and self.shield.real != "teacher":
            raise ValueError("shield.regression wants the teacher's image of each noise: set shield.real to teacher")
        if self.shield.gan and self.optim.discriminator is None:
            raise ValueError("optim.discriminator is missing: the GAN's head needs an optimizer")
        return self


class DistillRecipe(Stage, Recipe):
    kind: Literal["distill"] = Field(description="Makes a few-step student of a teacher.")
    teacher: str = Field(description='Folder of the teacher, or the name of a shipped one ("micro").')
    init: str | None = Field(None, description="Model that the student starts from; null starts from the teacher.")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="The final report.")


class StagesRecipe(Recipe):
    kind: Literal["stages"] = Field(description="Several distillations in a row, each from the last one's student.")
    name: str = Field(pattern=NAME, description="Name of the run; its directory is runs/<name>.")
    teacher: str = Field(description='Folder of the teacher, or the name of a shipped one ("micro").')
    stages: list[Stage] = Field(min_length=1, description="The distillations, in order; their names are their folders.")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="The final report.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [phase.name for phase in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {', '.join(names)}")
        return self


# --- what a teacher said ---------------------------------------------------------------------------------------------


class CacheRecipe(Recipe):
    kind: Literal["cache_trajectories"] = Field(description="Keeps a teacher's trajectories on disk.")
    name: str = Field(pattern=NAME, description="Name of the cache; its folder is runs/<name>.")
    teacher: str = Field(description='Folder of the teacher, or the name of a shipped one ("micro").')
    prompts: PromptSettings = Field(default_factory=PromptSettings, description="Prompts to draw from.")
    size: int | None = Field(None, ge=1, description="Pixels of a side; null asks the teacher's card.")
    steps: int = Field(default=4, ge=1, le=64, description="The student's steps: one state is kept for each.")
    substeps: int = Field(default=12, ge=1, description="The teacher's steps for each one of the student.")
    guidance_scale: float | None = Field(None, ge=0, description="The teacher's guidance; null asks its card.")
    samples: int = Field(ge=1, description="How many trajectories.")
    shard_size: int = Field(default=256, ge=1, description="Trajectories in a file.")
    first_seed: int = Field(default=1_000_000, ge=0, description="Sample i starts from seed first_seed + i.")
    batch_size: int = Field(default=64, ge=1, description="Trajectories that are sampled together.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="auto", description="bf16: the teacher runs under autocast; auto: where the device is faster with it."
    )


recipe_kinds.register("distill", DistillRecipe)
recipe_kinds.register("stages", StagesRecipe)
recipe_kinds.register("cache_trajectories", CacheRecipe)
