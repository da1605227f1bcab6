"""The recipes of the emoji dataset's models: autoencoder, text encoder, micro teacher, classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fewstep.config.base import Fraction, Settings
from fewstep.config.recipe import TrainingRecipe
from fewstep.config.sections import OptimSettings
from fewstep.core.registry import recipe_folders, recipe_kinds


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
    l1: Annotated[float, Field(ge=0)] = Field(default=1.0, description="Weight of the mean absolute error of pixels.")
    l2: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Weight of the mean squared error of pixels.")
    kl: Annotated[float, Field(ge=0)] = Field(
        default=1e-6, description="Weight of the divergence of the latents from a standard normal."
    )
    edge: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Weight of the mean absolute error of image gradients."
    )


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


class VaeRecipe(TrainingRecipe):
    kind: Literal["vae"] = Field(description="Trains an image autoencoder.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images.")
    model: VaeSettings = Field(description="The autoencoder.")
    loss: VaeLossSettings = Field(default_factory=VaeLossSettings, description="Weights of the loss's terms.")
    init: str | None = Field(None, description="Folder that holds vae/ to start from; null starts anew.")
    train_encoder: bool = Field(True, description="false: the decoder learns alone, and latents stay what they are.")
    core_share: Fraction = Field(0.0, description="Share of images that show core things, beyond their natural one.")
    optim: OptimSettings = Field(description="Optimizer.")


class TextEncoderRecipe(TrainingRecipe):
    kind: Literal["text_encoder"] = Field(description="Trains a text encoder by contrast with images.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images and their prompts.")
    model: TextSettings = Field(description="The text encoder.")
    vae: str = Field(description="Folder that holds vae/: the run that trained it, or a whole model.")
    temperature: float = Field(default=0.07, gt=0, description="Initial temperature of the contrastive loss.")
    optim: OptimSettings = Field(description="Optimizer.")


class FlowMatchingRecipe(TrainingRecipe):
    kind: Literal["flow_matching"] = Field(description="Trains a multi-step teacher by flow matching.")
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


class ClassifierRecipe(TrainingRecipe):
    kind: Literal["classifier"] = Field(description="Trains the classifier of name, style and color.")
    data: EmojiSettings = Field(default_factory=EmojiSettings, description="Images and their labels.")
    width: int = Field(default=64, ge=8, description="Channels of the first layer.")
    optim: OptimSettings = Field(description="Optimizer.")


EmojiRecipe = VaeRecipe | TextEncoderRecipe | FlowMatchingRecipe | ClassifierRecipe

recipe_kinds.register("vae", VaeRecipe)
recipe_kinds.register("text_encoder", TextEncoderRecipe)
recipe_kinds.register("flow_matching", FlowMatchingRecipe)
recipe_kinds.register("classifier", ClassifierRecipe)
recipe_folders.register("emoji", Path(__file__).parent / "recipes")
