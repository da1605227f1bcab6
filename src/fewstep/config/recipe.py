"""What a recipe of each kind may say: its sections are in `settings`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fewstep.config.sections import (
    NAME,
    DistillOptimSettings,
    EmojiSettings,
    EvaluateSettings,
    Fraction,
    OptimSettings,
    PromptSettings,
    RenoiseSettings,
    RolesSettings,
    Settings,
    ShieldSettings,
    SpearSettings,
    StudentSettings,
    TextSettings,
    TrainSettings,
    TrajectorySettings,
    TransformerSettings,
    VaeLossSettings,
    VaeSettings,
)

# --- recipes ---------------------------------------------------------------------------------------------------------


class BaseRecipe(Settings):
    name: str = Field(pattern=NAME, description="Name of the run; its directory is runs/<name>.")
    train: TrainSettings = Field(description="Length, batches, cadence.")


class VaeRecipe(BaseRecipe):
    kind: Literal["vae"] = Field(description="Trains an image autoencoder.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images.")
    model: VaeSettings = Field(description="The autoencoder.")
    loss: VaeLossSettings = Field(default_factory=VaeLossSettings, description="Weights of the loss's terms.")
    init: str | None = Field(None, description="Folder that holds vae/ to start from; null starts anew.")
    train_encoder: bool = Field(True, description="false: the decoder learns alone, and latents stay what they are.")
    core_share: Fraction = Field(0.0, description="Share of images that show core things, beyond their natural one.")
    optim: OptimSettings = Field(description="Optimizer.")


class TextRecipe(BaseRecipe):
    kind: Literal["text"] = Field(description="Trains a text encoder by contrast with images.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images and their prompts.")
    model: TextSettings = Field(description="The text encoder.")
    vae: str = Field(description="Folder that holds vae/: the run that trained it, or a whole model.")
    temperature: float = Field(default=0.07, gt=0, description="Initial temperature of the contrastive loss.")
    optim: OptimSettings = Field(description="Optimizer.")


class FlowRecipe(BaseRecipe):
    kind: Literal["flow"] = Field(description="Trains a multi-step teacher by flow matching.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images and their prompts.")
    model: TransformerSettings = Field(description="The denoiser.")
    vae: str = Field(description="Folder that holds vae/: the run that trained it, or a whole model.")
    text: str = Field(description="Folder that holds text_encoder/ and tokenizer/: likewise.")
    guidance_scale: float = Field(
        3.0, ge=0, description="Guidance of the previews, and the card's: cond + g (cond - null)."
    )
    init: str | None = Field(None, description="A model whose transformer to start from: a folder or a shipped name.")
    shift: float = Field(default=3.0, gt=0, description="Shift of the noise levels.")
    logit_mean: float = Field(default=0.0, description="Mean of logit(u).")
    logit_std: float = Field(default=1.0, gt=0, description="Standard deviation of logit(u).")
    prompt_dropout: Fraction = Field(default=0.1, description="Share of prompts replaced by the encoded empty prompt.")
    compile: bool = Field(default=False, description="Compile the transformer's block; needs a C++ compiler on a CPU.")
    optim: OptimSettings = Field(description="Optimizer.")


class JudgeRecipe(BaseRecipe):
    kind: Literal["judge"] = Field(description="Trains the classifier of name, style and color.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images and their labels.")
    width: int = Field(default=64, ge=8, description="Channels of the first layer.")
    optim: OptimSettings = Field(description="Optimizer.")


# --- distillation ----------------------------------------------------------------------------------------------------


class Phase(BaseRecipe):
    """One training of a student: a recipe's only one, or one of several in a row."""

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


class DistillRecipe(Phase):
    kind: Literal["distill"] = Field(description="Makes a few-step student of a teacher.")
    teacher: str = Field(description='Folder of the teacher, or the name of a shipped one ("micro").')
    init: str | None = Field(None, description="Model that the student starts from; null starts from the teacher.")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="The final report.")


class PhasesRecipe(Settings):
    kind: Literal["phases"] = Field(description="Several distillations in a row, each from the last one's student.")
    name: str = Field(pattern=NAME, description="Name of the run; its directory is runs/<name>.")
    teacher: str = Field(description='Folder of the teacher, or the name of a shipped one ("micro").')
    phases: list[Phase] = Field(min_length=1, description="The distillations, in order; their names are their folders.")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="The final report.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"two phases have the same name: {', '.join(names)}")
        return self


# --- what a teacher said ---------------------------------------------------------------------------------------------


class CacheRecipe(Settings):
    kind: Literal["cache"] = Field(description="Keeps a teacher's trajectories on disk.")
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


Recipe = VaeRecipe | TextRecipe | FlowRecipe | JudgeRecipe | DistillRecipe | PhasesRecipe | CacheRecipe
RECIPES: dict[str, type[Recipe]] = {
    "vae": VaeRecipe,
    "text": TextRecipe,
    "flow": FlowRecipe,
    "judge": JudgeRecipe,
    "distill": DistillRecipe,
    "phases": PhasesRecipe,
    "cache": CacheRecipe,
}
