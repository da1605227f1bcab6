"""The SD3 family: classes, defaults and folder layout of ``StableDiffusion3Pipeline``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from fewstep.errors import UserError
from fewstep.models.consistency import Mismatch, vae_mismatches, vocabulary_mismatches
from fewstep.models.family import Components, LoadingInfo, ModelFamily
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pretrained import build_module, load_pretrained, save_lora
from fewstep.models.scheduler import euler_sigmas, load_scheduler
from fewstep.models.sd3.denoiser import SD3Denoiser
from fewstep.models.sd3.keys import KEY_LAYOUTS
from fewstep.models.sd3.prompts import PROMPT_ROWS, SD3PromptEncoder
from fewstep.models.vae import vae_scale_factor

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

CLASSES = {
    "transformer": SD3Transformer2DModel,
    **dict.fromkeys(TEXT_ENCODERS[:2], CLIPTextModelWithProjection),
    TEXT_ENCODERS[2]: T5EncoderModel,
    "vae": AutoencoderKL,
}

#: The linear layers of a block: attention's, of image and text, and the feed-forwards'.
BLOCK_LINEARS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)


class SD3Family(ModelFamily):
    """Stable Diffusion 3 and 3.5: MMDiT with two CLIPs and T5 as text encoders (arXiv 2403.03206)."""

    pipeline_class = "StableDiffusion3Pipeline"
    modules = ("transformer", *TEXT_ENCODERS, "vae")
    others = (*TOKENIZERS, "scheduler")
    prompt_components = (*TEXT_ENCODERS, *TOKENIZERS)
    architecture = "stable-diffusion-3"
    patch_size = 2
    prompt_tokens = PROMPT_ROWS
    lora_target_modules = BLOCK_LINEARS
    quantizable_modules = BLOCK_LINEARS
    attention_backends = False
    key_layouts = KEY_LAYOUTS

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        return load_pretrained(CLASSES[name], path, dtype)

    def load_other(self, name: str, path: Path) -> Any:
        if name == "scheduler":
            return load_scheduler(path)
        return (T5Tokenizer if name == TOKENIZERS[-1] else CLIPTokenizer).from_pretrained(path)

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        return build_module(CLASSES[name], config)

    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        StableDiffusion3Pipeline(**components).save_config(folder)

    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_lora(StableDiffusion3Pipeline, folder, weights)

    def denoiser(self, transformer: SD3Transformer2DModel) -> SD3Denoiser:
        return SD3Denoiser(transformer)

    def prompt_encoder(self, components: Components, system_prompt: str = "") -> SD3PromptEncoder:
        tokenizers, encoders = ([components[name] for name in names] for names in (TOKENIZERS, TEXT_ENCODERS))
        return SD3PromptEncoder(tokenizers, encoders, system_prompt)

    def prompt_features(self, components: Components) -> int:
        return int(components["transformer"].config["joint_attention_dim"])

    def latent_multiple(self, components: Components) -> int:
        return vae_scale_factor(components["vae"]) * self.patch_size

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        config = components["transformer"].config
        largest = config["pos_embed_max_size"] * self.latent_multiple(components)
        if max(height, width) > largest:
            raise UserError(f"{width} x {height}: this transformer has positions for sides of at most {largest} pixels")
        factor = vae_scale_factor(components["vae"])
        return config["in_channels"], height // factor, width // factor

    def sigmas(self, components: Components, steps: int, shape: Sequence[int] | None = None) -> list[float]:
        return euler_sigmas(steps, self.shift(components))

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        *clips, t5 = (components[name].config for name in TEXT_ENCODERS)
        for encoder, tokenizer in zip(TEXT_ENCODERS, TOKENIZERS, strict=True):
            yield from vocabulary_mismatches(tokenizer, components[tokenizer], components[encoder].config.vocab_size)
        if (width := sum(clip.hidden_size for clip in clips)) > t5.d_model:
            yield "text_encoder_3", f"its hidden states have {t5.d_model} features, fewer than both CLIPs' {width}"
        transformer = components.get("transformer")
        if transformer is None:
            return
        config, pooled = transformer.config, sum(clip.projection_dim for clip in clips)
        if (patch := config["patch_size"]) != self.patch_size:
            yield "transformer", f"patch_size {patch} is not supported; only {self.patch_size} is"
        yield from vae_mismatches(components["vae"], config["in_channels"])
        if t5.d_model != (needed := config["joint_attention_dim"]):
            yield "text_encoder_3", f"its hidden states have {t5.d_model} features, the transformer takes {needed}"
        if pooled != (needed := config["pooled_projection_dim"]):
            yield "text_encoder", f"both CLIPs' pooled vectors have {pooled} features, the transformer takes {needed}"

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        return GenerationConfig(steps=40, guidance_scale=3.5), "Stable Diffusion 3.5"  # diffusers' scale is 4.5


SD3 = SD3Family()
