"""The sections of recipes: pydantic models that refuse unknown keys and describe each field.

Units: learning rates per update, lengths of training in steps, noise levels as `sigma` in [0, 1] (1 is noise) or as its
pre-shift value `u`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
NAME = r"^[A-Za-z0-9][\w.-]*$"


class Settings(BaseModel):
    """Base of all settings: unknown keys, infinities and NaN are refused; assignments are checked too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)


# --- shared ----------------------------------------------------------------------------------------------------------


class BestSettings(Settings):
    metric: str = Field(description='As it is logged in metrics.jsonl, such as "quality/name_top1".')
    mode: Literal["max", "min"] = Field(default="max", description="Whether larger or smaller values are better.")


class TrainSettings(Settings):
    steps: int = Field(ge=1, description="Length of the training, in steps of the trainer.")
    max_minutes: float | None = Field(
        default=None, gt=0, description="Ends the training earlier, after so much time of it."
    )
    batch_size: int = Field(ge=1, description="Samples in a batch; every update of a trainable takes new ones.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Batches whose gradients are averaged into one update."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the initial weights and of all noise.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="bf16: losses under autocast, weights stay fp32; auto: where the device is faster with it."
    )
    log_every: int = Field(
        default=10, ge=1, description="Steps between lines in metrics.jsonl; each is the mean over them."
    )
    sample_every: int = Field(default=0, ge=0, description="Steps between preview images; 0 makes none.")
    save_every: int = Field(default=200, ge=1, description="Steps between checkpoints; the last step always makes one.")
    save_minutes: float | None = Field(
        default=None, gt=0, description="Also a checkpoint when this many minutes passed."
    )
    max_checkpoints: int = Field(default=2, ge=1, description="Checkpoints to keep; older ones are deleted.")
    keep_best: BestSettings | None = Field(
        default=None, description="Keeps the checkpoint with the best logged value of a metric besides; null does not."
    )
    fsdp_shard_size: int | None = Field(
        default=None, ge=1, description="Processes that share one copy of the weights (hybrid sharding); null is all."
    )
    on_alert: Annotated[
        Literal["off", "warn", "stop", "rollback"],
        BeforeValidator(lambda given: "off" if given is False else given),  # YAML reads a bare off as false
    ] = Field(
        default="warn",
        description="When a metric is wrong for long: say so, end the run, or end it at its last good checkpoint.",
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; unset leaves torch's own choice."
    )


class OptimSettings(Settings):
    """AdamW with a learning rate that warms up linearly, then decays over the rest of the steps."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay of AdamW's first and second moments."
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        default="adamw",
        description="adamw8bit keeps the moments in 8 bits; it needs torchao (fewstep[lowbit]) and a compiler.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, on every parameter.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0 to lr.")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Shape of the decay after warm-up."
    )
    min_lr_ratio: Fraction = Field(default=0.0, description="Learning rate at the last step over the peak one.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; null does not clip."
    )
    ema_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Decay of the weights' moving average for previews and export; null keeps none.",
    )


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
    sampler: Literal["euler", "sde"] = Field(default="euler", description="How a step leads to the next noise level.")
    eta: Fraction = Field(default=1.0, description="Share of fresh noise in each step of the sde sampler; 0 is Euler.")


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
