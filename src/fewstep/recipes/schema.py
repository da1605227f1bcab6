"""What a recipe may say: pydantic models that refuse unknown keys and describe each field.

Units: learning rates per update, lengths of training in steps, noise levels as `sigma` in [0, 1] (1 is noise) or as its
pre-shift value `u`.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
NAME = r"^[A-Za-z0-9][\w.-]*$"


class Settings(BaseModel):
    """Base of all settings: unknown keys, infinities and NaN are refused; assignments are checked too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)


# --- shared ----------------------------------------------------------------------------------------------------------


class BestSettings(Settings):
    metric: str = Field(description='As it is logged in metrics.jsonl, such as "quality/name_top1".')
    better: Literal["higher", "lower"] = Field(default="higher", description="Which way is better.")


class TrainSettings(Settings):
    steps: int = Field(ge=1, description="Length of the training, in steps of the trainer.")
    minutes: float | None = Field(
        default=None, gt=0, description="Ends the training earlier, after so much time of it."
    )
    batch_size: int = Field(ge=1, description="Samples in a batch; every update of a player takes new ones.")
    accumulate: int = Field(default=1, ge=1, description="Batches whose gradients are averaged into one update.")
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of all noise.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="bf16: losses under autocast, weights stay fp32; auto: where the device is faster with it."
    )
    log_every: int = Field(
        default=10, ge=1, description="Steps between lines in metrics.jsonl; each is the mean over them."
    )
    preview_every: int = Field(default=0, ge=0, description="Steps between preview images; 0 makes none.")
    checkpoint_every: int = Field(
        default=200, ge=1, description="Steps between checkpoints; the last step always makes one."
    )
    checkpoint_minutes: float | None = Field(
        default=None, gt=0, description="Also a checkpoint when this many minutes passed."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Checkpoints to keep; older ones are deleted.")
    keep_best: BestSettings | None = Field(
        default=None, description="Keeps the checkpoint with the best logged value of a metric besides; null does not."
    )
    shard_group: int | None = Field(
        default=None, ge=1, description="Processes that share one copy of the weights (hybrid sharding); null is all."
    )
    alarms: Literal["off", "warn", "stop", "rewind"] = Field(
        default="warn",
        description="When a metric is wrong for long: say so, end the run, or end it at its last good checkpoint.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; unset leaves torch's own choice."
    )


class OptimSettings(Settings):
    """AdamW with a learning rate that warms up linearly, then decays over the rest of the steps."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay of AdamW's first and second moments."
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    bits: Literal[8, 32] = Field(
        default=32, description="Size of AdamW's moments; 8 needs torchao (fewstep[lowbit]) and a compiler."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, on every parameter.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0 to lr.")
    decay: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Shape of the decay after warm-up."
    )
    final_lr_ratio: Fraction = Field(default=0.0, description="Learning rate at the last step over the peak one.")
    grad_clip: float | None = Field(default=1.0, gt=0, description="Largest global gradient norm; null does not clip.")
    ema: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Decay of the weights' moving average for previews and export; null keeps none.",
    )


class EmojiSettings(Settings):
    things: int | None = Field(
        default=None, ge=1, description="Take the first N things of the world; null takes them all."
    )
    variants: int = Field(
        default=4, ge=1, description="Different placements of each emoji that are rendered for training."
    )


# --- the parts of a model --------------------------------------------------------------------------------------------


class VaeSettings(Settings):
    """diffusers' AutoencoderKL."""

    block_out_channels: list[int] = Field(min_length=1, description="Channels of each level; each but the last halves.")
    layers_per_block: int = Field(default=1, ge=1, description="Residual blocks at each level.")
    latent_channels: int = Field(default=16, ge=1, description="Channels of the latents.")
    norm_num_groups: int = Field(default=8, ge=1, description="Groups of the group normalisation.")


class VaeLossSettings(Settings):
    l1: Weight = Field(default=1.0, description="Weight of the mean absolute error of pixels.")
    l2: Weight = Field(default=0.0, description="Weight of the mean squared error of pixels.")
    kl: Weight = Field(default=1e-6, description="Weight of the divergence of the latents from a standard normal.")
    edge: Weight = Field(default=0.0, description="Weight of the mean absolute error of image gradients.")


class TextSettings(Settings):
    """transformers' Qwen3 and its byte-level BPE tokenizer."""

    vocab_size: int = Field(ge=260, description="Tokens of the tokenizer, bytes and special tokens included.")
    hidden_size: int = Field(ge=1, description="Width of the text encoder, and of the features that condition.")
    layers: int = Field(ge=2, description="Layers; the last but one's output conditions.")
    heads: int = Field(ge=1, description="Attention heads.")
    head_dim: int = Field(ge=1, description="Width of an attention head.")
    intermediate_size: int = Field(ge=1, description="Width of the feed-forward layers.")


class TransformerSettings(Settings):
    """diffusers' ZImageTransformer2DModel."""

    dim: int = Field(ge=1, description="Width.")
    n_layers: int = Field(ge=1, description="Layers over image and caption together.")
    n_refiner_layers: int = Field(ge=0, description="Layers over the image alone and over the caption alone, before.")
    n_heads: int = Field(ge=1, description="Attention heads; dim / n_heads must be the sum of axes_dims.")
    axes_dims: tuple[int, int, int] = Field(description="Rotary dimensions of caption position, row and column.")


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
    kind: Literal["judge"] = Field(description="Trains the classifier of name, style and colour.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images and their labels.")
    width: int = Field(default=64, ge=8, description="Channels of the first layer.")
    optim: OptimSettings = Field(description="Optimizer.")


# --- distillation ----------------------------------------------------------------------------------------------------


class PromptSettings(Settings):
    source: str = Field(
        default="emoji",
        description='"emoji" for the emoji world\'s, a text file with one a line, or a folder of fewstep prompts.',
    )
    split: Literal["train", "heldout"] = Field(default="train", description="Which of the emoji world's prompts.")


class StudentSettings(Settings):
    steps: int = Field(default=4, ge=1, le=64, description="Steps of the student.")
    anchors: list[Fraction] | None = Field(
        default=None,
        description="The student's noise levels before the shift, descending from 1; null spaces them evenly.",
    )
    anchor_schedule: Literal["fixed", "continuous"] = Field(
        default="fixed", description="continuous: a training step visits random levels in place of the anchors (CDM)."
    )
    sampler: Literal["euler", "renoise"] = Field(
        default="euler", description="How a step leads to the next noise level."
    )
    eta: Fraction = Field(
        default=1.0, description="Share of fresh noise in each step of the renoise sampler; 0 is Euler."
    )


class SpearSettings(Settings):
    enabled: bool = Field(default=True, description="Whether there is a spear (CFG augmentation).")
    weight: Weight = Field(default=1.0, description="Weight of its direction.")
    alpha: float = Field(default=4.0, ge=1, description="Guidance as in null + alpha (cond - null); 1 is none.")


class ShieldSettings(Settings):
    """Shields by weight; 0 leaves one out. Distribution matching is `weight`, the others add losses of their own."""

    enabled: bool = Field(default=True, description="Whether there is any shield.")
    weight: Weight = Field(default=1.0, description="Weight of distribution matching's direction.")
    scales: dict[Annotated[int, Field(ge=2)], Weight] = Field(
        default_factory=dict,
        description="Distribution matching at coarser latents besides: how many times coarser -> weight beside 1.",
    )
    mean_variance: Weight = Field(default=0.0, description="Weight of the mean-variance shield.")
    mmd: Weight = Field(default=0.0, description="Weight of the MMD of the teacher's features.")
    regression: Weight = Field(default=0.0, description="Weight of DMD's regression on the teacher's way from a noise.")
    gan: Weight = Field(default=0.0, description="Weight of the GAN on the teacher's features.")
    gan_penalty: Weight = Field(default=100.0, description="Weight of the GAN's approximate R1 penalty.")
    real: Literal["teacher", "data"] = Field(
        default="teacher",
        description="What GAN and MMD hold the student to: images of the teacher, or the emoji world's.",
    )
    real_samples: int = Field(
        default=1024, ge=2, description="How many of the emoji world's; of the teacher's it is trajectory.samples."
    )

    @property
    def others(self) -> bool:
        """Whether a shield beside distribution matching is on; all of these need latents that count as real."""
        return self.enabled and any((self.mean_variance, self.mmd, self.regression, self.gan))


class RenoiseSettings(Settings):
    schedule: Literal["shared", "full", "constrained", "hybrid"] = Field(
        default="hybrid", description="Where the noise levels of spear and shield are drawn."
    )
    sigma_min: Fraction = Field(default=0.02, description="Lowest sigma drawn.")
    sigma_max: Fraction = Field(default=0.98, description="Highest sigma drawn.")


class DistillOptimSettings(Settings):
    student: OptimSettings = Field(description="Optimizer of the student.")
    fake: OptimSettings | None = Field(None, description="Optimizer of the fake, where the method has one.")
    discriminator: OptimSettings | None = Field(None, description="Optimizer of the GAN's head, where there is one.")


class TrajectorySettings(Settings):
    """The teacher's own way from noise to image, for method: trajectory and for shields that want its images."""

    cache: str | None = Field(None, description="Folder that fewstep cache made; null makes one in the run.")
    samples: int = Field(default=1024, ge=1, description="Trajectories of a cache made in the run.")
    substeps: int = Field(default=12, ge=1, description="The teacher's steps for each one of the student.")
    guidance_scale: float | None = Field(None, ge=0, description="The teacher's guidance; null asks its card.")


class RolesSettings(Settings):
    """How teacher, student and fake are held in memory."""

    kind: Literal["copies", "lora"] = Field(
        default="copies", description="copies: three full models; lora: one frozen base, a LoRA stack for each learner."
    )
    base: Literal["fp32", "bf16", "fp8"] = Field(
        default="fp32",
        description="Weights of what is frozen: teacher, text encoder, autoencoder; fp8: the matrices of the teacher's "
        "blocks, the rest bf16. What learns is fp32 in any case.",
    )
    rank: int = Field(default=32, ge=1, description="Rank of the student's stack.")
    fake_rank: int | None = Field(None, ge=1, description="Rank of the fake's stack; null is the student's.")
    scale: float = Field(default=1.0, gt=0, description="Of what a stack adds: W + scale B A.")
    targets: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"],
        min_length=1,
        description="Endings of the linear layers' names that get a stack.",
    )


class EvaluateSettings(Settings):
    enabled: bool = Field(default=True, description="Whether the run ends with an evaluation and its report.")
    prompts: int = Field(default=200, ge=1, description="How many of the held-out prompts to evaluate on.")
    every: int = Field(default=0, ge=0, description="Steps between short evaluations while training; 0 makes none.")
    watched: int = Field(default=64, ge=1, description="How many of the held-out prompts these are on.")


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
    normaliser_floor: float = Field(default=0.1, gt=0, description="Lower bound of the per-sample normalisers.")
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
