"""What a recipe of kind lora contains: a training set, an adapter, a method, whose section is in the method's file."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from fewstep.config.base import Fraction, GuidanceScale, Pixels, Settings
from fewstep.config.recipe import TrainingRecipe
from fewstep.config.sections import OptimSettings, check_optimizers
from fewstep.core.registry import load_plugins, lora_methods


class OwnImagesSettings(Settings):
    """Images that the model itself makes of prompts, in place of a training set."""

    prompts: str = Field("emoji", description="Source of the prompts, as prompts.source of a distillation.")
    count: int = Field(default=1000, ge=1, le=10**6, description="Images, of as many random prompts.")


class PreservationSettings(OwnImagesSettings):
    """Prior preservation (DreamBooth, arXiv 2208.12242): images that the model makes without the LoRA, of other
    prompts, are trained on beside the set, so that the model keeps what it knows."""

    count: int = Field(default=200, ge=1, le=10**6, description="Images, of as many random prompts.")
    fraction: float = Field(default=0.5, gt=0, lt=1, description="Fraction of the batches that have these images.")


class LoraDataSettings(Settings):
    """Images with captions, and how they are used."""

    images: str | None = Field(
        None, description="Folder that fewstep lora prepare made, or the name of a training set (emoji-fluent)."
    )
    own_images: OwnImagesSettings | None = Field(
        None, description="Images that the model itself makes, in place of a training set; for a training adapter."
    )
    preservation: PreservationSettings | None = Field(
        None, description="The model's images of other prompts, trained on beside the set; null is none."
    )
    resolutions: Annotated[list[Pixels], Field(min_length=1)] | None = Field(
        None,
        description="Pixels of a square crop; other aspect ratios have about its area, and each image is trained at "
        "each resolution. null is that of the set.",
    )
    caption_dropout: Fraction = Field(0.05, description="Fraction of captions replaced by the null prompt.")
    cache: str | None = Field(
        None, description="Folder of the encoded images and captions, which runs may share; null is the run's own."
    )

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if (self.images is None) == (self.own_images is None):
            raise ValueError("give images, or own_images")
        if self.own_images is not None and len(self.resolutions or [0]) > 1:
            raise ValueError("resolutions: own images have one")
        if self.own_images is not None and self.preservation is not None:
            raise ValueError("preservation: own_images are the model's already; leave one out")
        return self


class AdapterSettings(Settings):
    """The adapter that is trained. Its weights are fp32."""

    kind: Literal["lora", "dora", "lokr"] = Field(
        "lora",
        description="dora also trains the norms of the weights' rows; lokr is a Kronecker product of a small matrix "
        "and one of this rank.",
    )
    rank: int = Field(
        default=64, ge=1, le=65_536, description="Rank; of lokr, from half of the second factor's size on it is whole."
    )
    factor: int | None = Field(
        None, ge=2, le=65_536, description="Of lokr: size of the small matrix; null is about the root of the weight's."
    )
    alpha: float | None = Field(
        None, gt=0, le=1_000_000, description="The adapter adds (alpha / rank) B A; null is the rank: a scale of 1."
    )
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="Name endings of the linear layers with adapters; null is all of attention and feed-forward.",
    )
    init: str | None = Field(
        None, description="LoRA file that it starts from, of the same rank and layers; null starts from no change."
    )
    refiners: bool = Field(True, description="Whether the refiner blocks before the main ones have adapters too.")
    save_dtype: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="Of the LoRA files that are written.")


class LoraModelsSettings(Settings):
    """How the frozen models are held in memory."""

    frozen_dtype: Literal["fp32", "bf16", "fp8", "nf4"] = Field(
        default="bf16",
        description="Of frozen weights; fp8, nf4 (4 bits): the linear layers of the blocks, all other weights bf16.",
    )
    compile: bool | Literal["auto"] = Field(
        default=False, description="Compile the transformer's blocks; auto: where there is a compiler."
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute each block in the backward pass instead of keeping its activations."
    )
    offload_blocks: bool = Field(
        default=False,
        description="Keep the blocks' frozen weights in the CPU's memory and copy each block's to the GPU while it "
        "computes: slow. Needs gradient_checkpointing.",
    )

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload_blocks and not self.gradient_checkpointing:
            raise ValueError("offload_blocks: the backward pass would keep all blocks; set gradient_checkpointing too")
        return self


class TimestepSettings(Settings):
    """Where flow matching draws its noise levels."""

    distribution: Literal["sigmoid", "uniform", "weighted", "shift"] = Field(
        "sigmoid",
        description="Of sigma. sigmoid: the sigmoid of a normal number; uniform: U(0, 1); weighted: U(0, 1), with a "
        "loss weight that is largest at 1/2 and 0 at both ends; shift: U(0, 1), shifted towards noise.",
    )
    shift: float | None = Field(
        None, gt=0, le=1000, description="Of the distribution shift; null is that of the model's sampler."
    )

    @model_validator(mode="after")
    def _check_shift(self) -> Self:
        if self.shift is not None and self.distribution != "shift":
            raise ValueError(f"shift: no effect on {self.distribution}; set distribution: shift, or leave it out")
        return self


class LoraPreviewSettings(Settings):
    """Images that are made every ``train.sample_every`` steps, by the model's own sampler."""

    prompts: list[str] | None = Field(
        None, min_length=1, max_length=64, description="Their prompts; null is the first captions of the set."
    )
    guidance_scale: GuidanceScale | None = Field(
        None, description="As in cond + g (cond - null); null is the model's own. Must be 0 for a distilled model."
    )


class LoraMethodConfig(Settings):
    """Base of the sections of methods that train a LoRA; ``name`` selects the method."""

    name: str

    def trainable_parts(self) -> list[str]:
        """Names of the parts that are trained: the keys of ``optim``; "lora" is the adapter that is saved."""
        return ["lora"]

    @property
    def teacher_model(self) -> str | None:
        """A second model that the method needs; None if it needs none."""
        return None

    @property
    def teacher_adapters(self) -> list[str]:
        """Names of the trained adapters on the second model."""
        return []

    @property
    def teacher_lora(self) -> str | None:
        """A LoRA file of the second model, which is not trained."""
        return None

    @property
    def copied(self) -> bool:
        """Whether the method keeps a copy of the trained adapter, which it updates itself."""
        return False

    @property
    def image_encoder(self) -> str | None:
        """Folder of a vision-language model that encodes the images of the training set with their captions."""
        return None

    @property
    def few_step_only(self) -> bool:
        """Whether the model must be a few-step one; where there is a second model, it must be."""
        return self.teacher_model is not None

    @property
    def added_lora(self) -> str | None:
        """A LoRA file that is added to the model while it is trained."""
        return None

    @property
    def added_strength(self) -> float:
        """Its strength."""
        return 1.0

    def check(self, recipe: LoraRecipe) -> None:
        """Refuse what does not fit the rest of the recipe. Raises: ValueError, one line that names the key."""


class LoraRecipe(TrainingRecipe):
    """The training of a LoRA."""

    kind: Literal["lora"] = Field(description="Trains a LoRA on images with captions.")
    model: str = Field(description='Folder or hub id of the model, or the name of a bundled one ("micro-turbo").')
    method: LoraMethodConfig = Field(description="The method; its keys depend on method.name.")
    data: LoraDataSettings = Field(description="Images with captions.")
    adapter: AdapterSettings = Field(default_factory=AdapterSettings, description="The adapter that is trained.")
    models: LoraModelsSettings = Field(default_factory=LoraModelsSettings, description="The frozen models.")
    timesteps: TimestepSettings = Field(
        default_factory=TimestepSettings, description="The noise levels of flow matching."
    )
    preview: LoraPreviewSettings = Field(default_factory=LoraPreviewSettings, description="Images while training.")
    keep_files: int = Field(
        default=7, ge=1, description="LoRA files to keep, the newest; one is written with every checkpoint."
    )
    optim: dict[str, OptimSettings] = Field(description="Optimizers by trainable part.")

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        parts = self.method.trainable_parts()
        for part in parts:
            if part not in self.optim:
                raise ValueError(f"optim.{part} is missing: method {self.method.name} trains {', '.join(parts)}")
        for part in self.optim:
            if part not in parts:
                raise ValueError(
                    f"optim.{part}: method {self.method.name} has no such part (it trains {', '.join(parts)})"
                )
        check_optimizers({f"optim.{part}": settings for part, settings in self.optim.items()})
        self._check_adapter()
        if self.train.keep_best is not None:
            raise ValueError("train.keep_best: LoRA files are kept by keep_files; leave it out")
        if self.train.fsdp_shard_size is not None:
            raise ValueError("train.fsdp_shard_size: a LoRA is trained by one process; leave it out")
        self.method.check(self)
        return self

    def _check_adapter(self) -> None:
        """Raises: ValueError if its kind does not fit the rest of the recipe."""
        kind, method = self.adapter.kind, self.method
        dtype = self.models.frozen_dtype
        if kind == "dora" and dtype in ("fp8", "nf4"):
            raise ValueError(
                "adapter.kind dora needs the norms of the weights: set models.frozen_dtype to bf16 or fp32"
            )
        if kind == "lokr" and dtype == "nf4":
            raise ValueError("adapter.kind lokr: not on weights in nf4; set models.frozen_dtype to fp8, bf16 or fp32")
        if kind != "lokr":
            if self.adapter.factor is not None:
                raise ValueError(f"adapter.factor: no effect on {kind}; set adapter.kind to lokr, or leave it out")
            return
        if self.adapter.init is not None:
            raise ValueError("adapter.init: a lokr starts from no change; leave it out, or set adapter.kind to lora")
        if method.added_lora is not None or (method.teacher_lora is not None and method.teacher_adapters):
            file = method.added_lora or method.teacher_lora
            raise ValueError(f"adapter.kind lokr: {file} would be a LoRA on the same model; set adapter.kind to lora")

    @classmethod
    def validation_model(cls) -> type[Self]:
        return create_model(cls.__name__, __base__=cls, __module__=__name__, method=_method_union())


def _method_union() -> Any:
    """The type of the section ``method``: a discriminated union of all registered methods."""
    load_plugins()
    names = lora_methods.names()
    union = reduce(or_, [lora_methods.get(name).config_model() for name in names])
    return Annotated[union, Field(discriminator="name", description=f"The method: {', '.join(names)}.")]
