"""The recipes of the models trained on the emoji dataset: autoencoder, text encoder, teacher, classifier, reward."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fewstep.config.base import Fraction, GuidanceScale, Settings
from fewstep.config.recipe import TrainingRecipe
from fewstep.config.sections import OptimSettings

LossWeight = Annotated[float, Field(ge=0)]
RotaryDim = Annotated[int, Field(ge=2, multiple_of=2)]


class EmojiDataSettings(Settings):
    """Which part of the dataset is used."""

    num_objects: int | None = Field(
        default=None, ge=1, description="Use the first N objects of the dataset; null uses all of them."
    )
    augmentations_per_object: int = Field(
        default=4, ge=1, description="Images rendered of each object, style and background, in different placements."
    )


# --- models ----------------------------------------------------------------------------------------------------------


class VAESettings(Settings):
    """diffusers' AutoencoderKL."""

    block_out_channels: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(
        min_length=1, description="Channels of each level; each level but the last halves the resolution."
    )
    layers_per_block: int = Field(default=1, ge=1, description="Residual blocks in each level.")
    latent_channels: int = Field(default=16, ge=1, description="Channels of the latents.")
    norm_num_groups: int = Field(default=8, ge=1, description="Groups of the group normalization.")

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels {channels} is not a multiple of norm_num_groups")
        return self


class VAELossSettings(Settings):
    """Weights of the autoencoder's losses."""

    l1: LossWeight = Field(default=1.0, description="Weight of the mean absolute error of pixels.")
    l2: LossWeight = Field(default=0.0, description="Weight of the mean squared error of pixels.")
    kl: LossWeight = Field(
        default=1e-6, description="Weight of the KL divergence of the latents from a standard normal distribution."
    )
    gradient_l1: LossWeight = Field(default=0.0, description="Weight of the mean absolute error of image gradients.")


class AdversarialLossSettings(VAELossSettings):
    """Weights of the losses of an autoencoder or decoder that is trained with a patch discriminator, or without."""

    adversarial: LossWeight = Field(default=0.0, description="Weight of the patch discriminator's hinge loss.")
    feature_matching: LossWeight = Field(
        default=0.0, description="Weight of the difference of the patch discriminator's features."
    )


class TextEncoderSettings(Settings):
    """transformers' Qwen3 and its byte-level BPE tokenizer."""

    vocab_size: int = Field(ge=260, description="Tokens of the tokenizer, including bytes and special tokens.")
    hidden_size: int = Field(ge=1, description="Width of the text encoder and of the features that condition.")
    layers: int = Field(ge=2, description="Layers; the output of the second to last conditions.")
    heads: int = Field(ge=1, description="Attention heads.")
    head_dim: int = Field(ge=2, multiple_of=2, description="Width of an attention head.")
    intermediate_size: int = Field(ge=1, description="Width of the feed-forward layers.")


class TransformerSettings(Settings):
    """diffusers' ZImageTransformer2DModel."""

    dim: int = Field(ge=1, description="Width.")
    n_layers: int = Field(ge=1, description="Layers over image and caption tokens together.")
    n_refiner_layers: int = Field(
        ge=0, description="Layers over image tokens alone, and over caption tokens alone, that precede these."
    )
    n_heads: int = Field(ge=1, description="Attention heads; dim / n_heads must be the sum of axes_dims.")
    axes_dims: tuple[RotaryDim, RotaryDim, RotaryDim] = Field(
        description="Rotary dimensions of caption position, row and column."
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.dim != self.n_heads * sum(self.axes_dims):
            raise ValueError(
                f"dim {self.dim} is not n_heads {self.n_heads} times the sum of axes_dims, {sum(self.axes_dims)}"
            )
        return self


def default_discriminator_optim() -> OptimSettings:
    """AdamW with the moments usual for discriminators."""
    return OptimSettings(lr=4e-4, betas=(0.5, 0.9))


# --- recipes ---------------------------------------------------------------------------------------------------------


class VAERecipe(TrainingRecipe):
    """Training of an image autoencoder."""

    kind: Literal["vae"] = Field(description="Trains an image autoencoder.")
    model: VAESettings = Field(description="The autoencoder.")
    loss: AdversarialLossSettings = Field(
        default_factory=AdversarialLossSettings, description="Weights of the loss terms."
    )
    init: str | None = Field(
        None, description="Folder with vae/ to start from, or a bundled model's name; null starts from random weights."
    )
    train_encoder: bool = Field(True, description="false trains the decoder only; the latents stay the same.")
    latent_noise: float = Field(
        0.0,
        ge=0,
        description="Largest standard deviation of noise added to latents before decoding, relative to that of the "
        "latents; each image has another. The decoder learns to decode the inexact latents of a generative model.",
    )
    equivariance: Fraction = Field(
        0.0,
        description="Fraction of batches whose latents and images are scaled and rotated equally before decoding, "
        "which makes latents smooth (EQ-VAE).",
    )
    core_fraction: Fraction = Field(
        0.0, description="Fraction of images drawn from the core objects alone; the others are drawn from all objects."
    )
    optim: OptimSettings = Field(description="Optimizer of the autoencoder.")
    discriminator_optim: OptimSettings = Field(
        default_factory=default_discriminator_optim,
        description="Optimizer of the patch discriminator, which is trained if a loss weight needs it.",
    )


class DecoderRecipe(TrainingRecipe):
    """Training of a decoder on inexact latents."""

    kind: Literal["decoder"] = Field(description="Trains the decoder of a whole model on inexact latents.")
    init: str = Field(description="The model: a folder or the name of a bundled one.")
    loss: AdversarialLossSettings = Field(default_factory=AdversarialLossSettings, description="Weights; kl is unused.")
    latent_noise: float = Field(
        0.5, ge=0, description="Largest standard deviation of noise on half of the latents, relative to theirs."
    )
    largest_sigma: Fraction = Field(
        0.7, description="Largest noise level at which the transformer predicts the other half of the latents."
    )
    optim: OptimSettings = Field(description="Optimizer of the decoder.")
    discriminator_optim: OptimSettings = Field(
        default_factory=default_discriminator_optim,
        description="Optimizer of the patch discriminator, which is trained if a loss weight needs it.",
    )


class TextEncoderRecipe(TrainingRecipe):
    """Contrastive training of a text encoder."""

    kind: Literal["text_encoder"] = Field(description="Trains a text encoder contrastively with images.")
    data: EmojiDataSettings = Field(default_factory=EmojiDataSettings, description="Images and their prompts.")
    model: TextEncoderSettings = Field(description="The text encoder.")
    vae: str = Field(description="Folder with vae/: the run that trained it, or a model; or a bundled model's name.")
    temperature: float = Field(default=0.07, gt=0, description="Initial temperature of the contrastive loss.")
    optim: OptimSettings = Field(description="Optimizer.")


class FlowMatchingRecipe(TrainingRecipe):
    """Training of a teacher by flow matching."""

    kind: Literal["flow_matching"] = Field(description="Trains a multi-step teacher by flow matching.")
    data: EmojiDataSettings = Field(default_factory=EmojiDataSettings, description="Images and their prompts.")
    model: TransformerSettings = Field(description="The transformer.")
    vae: str = Field(description="Folder with vae/: the run that trained it, or a model; or a bundled model's name.")
    text_encoder: str = Field(
        description="Folder with text_encoder/ and tokenizer/: the run that trained them, or a model; or a bundled "
        "model's name."
    )
    guidance_scale: GuidanceScale = Field(
        3.0, description="Guidance of the previews and of the saved model: cond + g (cond - null)."
    )
    init: str | None = Field(
        None, description="Model whose transformer to start from: a folder or the name of a bundled one."
    )
    shift: float = Field(default=3.0, gt=0, le=1000, description="Shift of the noise levels.")
    logit_mean: float = Field(default=0.0, description="Mean of logit(u).")
    logit_std: float = Field(default=1.0, gt=0, description="Standard deviation of logit(u).")
    prompt_dropout: Fraction = Field(default=0.1, description="Fraction of prompts replaced by the null prompt.")
    caption_noise: Fraction = Field(
        default=0.0,
        description="Fraction of prompts that describe another image, as captions from the web often do. It is what "
        "makes guidance matter.",
    )
    compile: bool = Field(
        default=False, description="Compile the transformer's blocks; on a CPU, needs a C++ compiler."
    )
    optim: OptimSettings = Field(description="Optimizer.")


class ClassifierRecipe(TrainingRecipe):
    """Training of the classifier."""

    kind: Literal["classifier"] = Field(description="Trains the classifier of object, style and background.")
    data: EmojiDataSettings = Field(default_factory=EmojiDataSettings, description="Images and their labels.")
    base_channels: int = Field(default=64, ge=8, multiple_of=4, description="Channels of the first layer.")
    optim: OptimSettings = Field(description="Optimizer.")


class RewardRecipe(TrainingRecipe):
    """Training of the emoji reward."""

    kind: Literal["reward"] = Field(description="Trains a contrastive image-text reward.")
    data: EmojiDataSettings = Field(
        default_factory=EmojiDataSettings, description="Images and their prompts; augmentations are autoencoded images."
    )
    channels: int = Field(default=32, ge=4, multiple_of=4, description="Channels of the image tower's first layer.")
    vae: str = Field(
        description="Folder with vae/, whose decoded images are among the training images; or a bundled model's name."
    )
    teacher: str | None = Field(
        default=None,
        description="Model whose images the card is also measured on: a folder or the name of a bundled one; null "
        "measures on real images alone.",
    )
    student: str | None = Field(
        default=None,
        description="Model whose images of the training prompts must score below real ones: a folder or the name of a "
        "bundled one. What a distilled student still lacks then has a gradient.",
    )
    largest_attack: float = Field(
        default=1.5,
        ge=0,
        description="Largest L2 norm of the adversarial change of half of the images, whose pixels "
        "are in [0, 1]; what a student finds by following the gradient is then a change that people see.",
    )
    optim: OptimSettings = Field(description="Optimizer.")
