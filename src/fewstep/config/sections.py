"""The sections that recipes share: training, optimizers, prompts, the student, the models, evaluation.

Units: learning rates per update, lengths of training in steps, noise levels as `sigma` in [0, 1] (1 is noise) or as
its pre-shift value `u`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fewstep.config.base import BatchSize, Fraction, GuidanceScale, SamplingSteps, Seed, Settings, Updates

# --- shared ----------------------------------------------------------------------------------------------------------


class BestSettings(Settings):
    """Which checkpoint is the best one."""

    metric: str = Field(description="Its name in metrics.jsonl, such as val/object_acc.")
    mode: Literal["max", "min"] = Field(default="max", description="Whether larger or smaller values are better.")
    at_least: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Further metrics that must not have fallen below this share of their first values, as "
        "{val/object_acc: 0.98}; a checkpoint at which one has is not the best one.",
    )


TrackerName = Literal["wandb", "mlflow"]


class TrainSettings(Settings):
    """Length, batches and cadence of a training."""

    steps: int = Field(ge=1, le=10**9, description="Steps of the training.")
    max_minutes: float | None = Field(
        default=None, gt=0, description="Ends the training earlier, after this many minutes of it."
    )
    clock: Literal["wall", "thread"] = Field(
        default="wall",
        description="What max_minutes counts; thread: the time that the training's main thread computes, for "
        "comparisons on one CPU thread beside other work.",
    )
    batch_size: BatchSize = Field(description="Samples in a batch; every update of a trainable part takes a new batch.")
    gradient_accumulation_steps: Updates = Field(
        default=1, description="Batches whose gradients are averaged into one update."
    )
    seed: Seed = Field(default=0, description="Seed of the initial weights and of all noise.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32",
        description="bf16: losses under autocast, weights stay fp32; auto: where the device is faster with it, decided "
        "when the run starts and kept when it is resumed.",
    )
    log_every: int = Field(
        default=10, ge=1, description="Steps between lines in metrics.jsonl; each is the mean over them."
    )
    sample_every: int = Field(default=0, ge=0, description="Steps between preview images; 0 makes none.")
    save_every: int = Field(default=200, ge=1, description="Steps between checkpoints; the last step always makes one.")
    save_minutes: float | None = Field(default=None, gt=0, description="Also a checkpoint after this many minutes.")
    async_checkpoints: bool = Field(
        default=False,
        description="Copy what a checkpoint holds to the CPU's memory and write it while the training continues.",
    )
    max_checkpoints: int = Field(default=2, ge=1, description="Checkpoints to keep; older ones are deleted.")
    keep_best: BestSettings | None = Field(
        default=None, description="Also keeps the checkpoint with the best logged value of a metric."
    )
    fsdp_shard_size: int | None = Field(
        default=None, ge=1, description="Processes that shard one copy of the weights (hybrid sharding); null is all."
    )
    on_alert: Annotated[
        Literal["off", "warn", "stop", "rollback"],
        BeforeValidator(lambda given: "off" if given is False else given),  # YAML reads a bare off as false
    ] = Field(
        default="warn",
        description="What follows when an alert rule fires: nothing, a warning, the end of the run, or the end of the "
        "run at its last good checkpoint.",
    )
    trackers: list[TrackerName] = Field(
        default=[],
        description="Experiment trackers that also get the metrics and previews (fewstep[wandb], fewstep[mlflow]).",
    )
    num_threads: int | None = Field(
        default=None, ge=1, le=4096, description="CPU threads of torch; null is torch's default."
    )


class OptimSettings(Settings):
    """AdamW with a learning rate that warms up linearly, then decays over the rest of the steps."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="Decay of AdamW's first and second moments."
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        default="adamw",
        description="adamw8bit keeps the moments in 8 bits; it needs torchao (fewstep[lowbit]) and a compiler. muon "
        "orthogonalizes the updates of the blocks' matrices; AdamW trains all other parameters.",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, on every parameter.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0 to lr.")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Shape of the decay after warm-up."
    )
    min_lr_ratio: Fraction = Field(default=0.0, description="Learning rate at the last step over the peak one.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Largest global gradient norm; null is no clipping."
    )
    ema_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Decay of the weights' moving average for previews and export; null keeps none.",
    )


def check_optimizers(optim: Mapping[str, OptimSettings]) -> None:
    """Check optimizers by their keys. Raises: ValueError for a value without effect."""
    for key, settings in optim.items():
        if settings.lr_schedule == "constant" and settings.min_lr_ratio:
            raise ValueError(
                f"{key}.min_lr_ratio: no effect on a constant rate; set {key}.min_lr_ratio=0 too, or leave it out"
            )


# --- distillation ----------------------------------------------------------------------------------------------------


class StreamSettings(Settings):
    """How a stream of prompts is read."""

    shuffle_buffer: int = Field(
        default=10_000, ge=1, le=10**7, description="Prompts that each worker keeps in memory and shuffles together."
    )
    num_workers: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Processes that read ahead for each training process, at most one per file; 0 reads in the "
        "training process.",
    )


class RealStreamSettings(StreamSettings):
    """How real latents and images are read from shards."""

    shuffle_buffer: int = Field(
        default=1000, ge=1, le=10**7, description="Samples that each worker keeps in memory and shuffles together."
    )


class PromptSettings(Settings):
    """Where prompts come from, and which are held out."""

    source: str = Field(
        default="emoji",
        description="A prompt source (emoji), a .txt, .jsonl, .json, .csv, .tsv, .parquet or .tar file, several as "
        "shards-{000..099}.tar, a folder of these, a folder written by fewstep encode-prompts, or "
        "hf:owner/name[:split].",
    )
    column: str = Field(default="prompt", description="Column or key of the prompts, in all but text files.")
    validation_source: str | None = Field(
        None, description="File or folder of the validation prompts; null holds them out of the source."
    )
    test_source: str | None = Field(
        None, description="File or folder of the test prompts; null holds them out of the source."
    )
    heldout_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=0.5,
        description="Fraction of a file's or folder's prompts held out for validation, and again for test; a stream's "
        "are not.",
    )
    stream: StreamSettings | None = Field(
        None,
        description="Reads the training prompts as they are needed, from a source of any size; null reads a list.",
    )


class ModelsSettings(Settings):
    """How teacher, student and further copies such as the fake score are held in memory."""

    train: Literal["full", "lora"] = Field(
        default="full", description="full: a full copy for each; lora: one frozen base, a LoRA adapter for each."
    )
    frozen_dtype: Literal["fp32", "bf16", "fp8"] = Field(
        default="fp32",
        description="Of frozen weights: teacher, text encoder, autoencoder; fp8: the linear layers of the teacher's "
        "blocks, all other weights bf16. Trained weights are fp32.",
    )
    rank: int = Field(default=32, ge=1, le=65_536, description="Rank of the student's adapter.")
    fake_score_rank: int | None = Field(
        None, ge=1, le=65_536, description="Rank of the other adapters; null is the student's."
    )
    lora_alpha: float | None = Field(
        None, gt=0, le=1_000_000, description="Adapters add (lora_alpha / rank) B A; null is the rank: a scale of 1."
    )
    target_modules: list[str] | None = Field(
        None, min_length=1, description="Name endings of the linear layers with adapters; null is the family's default."
    )
    lora_per_step: bool = Field(
        default=False, description="The student has an adapter for each of its steps, which are saved beside the base."
    )
    compile: bool | Literal["auto"] = Field(
        default=False,
        description="Compile the transformers' blocks; needs a C++ compiler on a CPU. auto: where there is one.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute each block in the backward pass instead of keeping its activations."
    )
    context_parallel: int = Field(
        default=1, ge=1, le=1024, description="Processes that share each sample, each with a part of its tokens."
    )

    @model_validator(mode="after")
    def _check_adapter_keys(self) -> ModelsSettings:
        for key in ("rank", "fake_score_rank", "lora_alpha", "target_modules", "lora_per_step"):
            if self.train == "full" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: no effect on full copies; set models.train: lora, or leave it out")
        if self.context_parallel > 1 and self.compile is True:
            raise ValueError("compile: not with models.context_parallel; leave one of the two out")
        return self


class TrajectorySettings(Settings):
    """The teacher's trajectories from noise to image, where the method trains on them or on their images."""

    cache: str | None = Field(
        None, description="Folder that fewstep cache-trajectories made; null makes one in the run's folder."
    )
    num_trajectories: int = Field(
        default=1024, ge=1, le=10**9, description="Trajectories of a cache made in the run's folder."
    )
    teacher_steps_per_student_step: Updates = Field(default=12, description="Teacher steps per student step.")
    guidance_scale: GuidanceScale | None = Field(
        None, description="The teacher's guidance; null is its generation config's."
    )


class WatchSettings(Settings):
    """What validation measures besides scorers where a reward is trained on, and when it raises an alarm."""

    diversity_prompts: int = Field(default=8, ge=1, description="Prompts of which several seeds are made.")
    diversity_seeds: int = Field(default=4, ge=2, description="Seeds of each.")
    teacher_steps: SamplingSteps = Field(
        default=25, description="Steps of the teacher's images that the Frechet distance is measured to."
    )
    steps: int = Field(
        default=100, ge=1, description="Steps that the reward is above and another measure below its start: the alarm."
    )
    share: Fraction = Field(default=0.95, description="Share of its first value below which a measure has fallen.")


def check_label(label: str) -> str:
    """The label of a compared model, which heads its column. Raises: ValueError."""
    if label in ("teacher", "student", "real") or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", label):
        raise ValueError(
            f"the label {label!r} must be of letters, digits, - and ., and none of teacher, student and real"
        )
    return label


Label = Annotated[str, AfterValidator(check_label)]


class EvaluateSettings(Settings):
    """Validation while a student trains, and the evaluation at the end."""

    enabled: bool = Field(default=True, description="Whether the run ends with an evaluation and its report.")
    num_prompts: int = Field(default=200, ge=1, description="Test prompts of the final evaluation.")
    max_minutes: float | None = Field(
        default=10, gt=0, description="Where it would take longer, fewer of them are measured; null is no limit."
    )
    validation_prompts: int = Field(default=64, ge=1, description="Validation prompts of evaluations while training.")
    validate_every: int = Field(default=0, ge=0, description="Steps between evaluations while training; 0 is never.")
    scorers: list[str] | None = Field(
        None, description="Scorers by name; null is every bundled scorer that applies to the prompts."
    )
    compare: dict[Label, str] = Field(
        default_factory=dict,
        description="Further models in the report, each with its own steps and guidance: label -> folder, hub id or "
        "bundled name.",
    )
    features: str = Field(
        default="open-nsfw",
        description="Feature network of the Frechet distances: open-nsfw, or inception:, clip: or dinov2: with a path "
        "or hub id.",
    )
    watch: WatchSettings = Field(
        default_factory=WatchSettings, description="Watch for reward hacking, where a reward is trained on."
    )
