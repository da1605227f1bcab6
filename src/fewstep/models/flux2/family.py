"""The FLUX.2 [klein] family: classes, defaults and folder layout of ``Flux2KleinPipeline``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from fewstep.core import flow
from fewstep.models.consistency import Mismatch, chat_template_mismatches, vocabulary_mismatches
from fewstep.models.family import MODEL_INDEX, Components, LoadingInfo, ModelFamily
from fewstep.models.flux2 import vae as flux2_vae
from fewstep.models.flux2.denoiser import Flux2Denoiser
from fewstep.models.flux2.keys import KEY_LAYOUTS
from fewstep.models.flux2.prompts import LAYERS, TOKENS, Flux2PromptEncoder
from fewstep.models.flux2.schedule import STEPS, dynamic_shift, fixed, is_dynamic, open_scheduler
from fewstep.models.flux2.schedule import TOKENS as IMAGE_TOKENS
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pretrained import build_module, load_pretrained, save_lora
from fewstep.models.vae import vae_scale_factor

CLASSES = {"transformer": Flux2Transformer2DModel, "text_encoder": Qwen3ForCausalLM, "vae": AutoencoderKLFlux2}

#: The linear layers of a block of two streams, and of one.
BLOCK_LINEARS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out"),
)


class Flux2Family(ModelFamily):
    """FLUX.2 [klein] (Black Forest Labs, 2026), base and distilled, with Qwen3 as the text encoder."""

    pipeline_class = "Flux2KleinPipeline"
    architecture = "flux2-klein"
    patch_size = 1
    prompt_tokens = TOKENS
    lora_target_modules = BLOCK_LINEARS
    quantizable_modules = BLOCK_LINEARS
    key_layouts = KEY_LAYOUTS

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        return load_pretrained(CLASSES[name], path, dtype)

    def load_other(self, name: str, path: Path) -> Any:
        return open_scheduler(path) if name == "scheduler" else Qwen2Tokenizer.from_pretrained(path)

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        return build_module(CLASSES[name], config)

    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        Flux2KleinPipeline(**components, is_distilled=config.guidance_distilled).save_config(folder)

    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_lora(Flux2KleinPipeline, folder, weights)

    def denoiser(self, transformer: Flux2Transformer2DModel) -> Flux2Denoiser:
        return Flux2Denoiser(transformer)

    def prompt_encoder(self, components: Components, system_prompt: str = "") -> Flux2PromptEncoder:
        return Flux2PromptEncoder(components["tokenizer"], components["text_encoder"], system_prompt, max_tokens=TOKENS)

    def prompt_features(self, components: Components) -> int:
        return int(components["transformer"].config["joint_attention_dim"])

    def latent_multiple(self, components: Components) -> int:
        return vae_scale_factor(components["vae"]) * flux2_vae.PATCH

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        multiple = self.latent_multiple(components)
        return int(components["transformer"].config["in_channels"]), height // multiple, width // multiple

    def shift(self, components: Components) -> float:
        """That of 1024 x 1024 pixels in 50 steps where it depends on them; a student has it at all sizes."""
        config = components["scheduler"].config
        return dynamic_shift(IMAGE_TOKENS, STEPS) if is_dynamic(config) else float(config["shift"])

    def sigmas(self, components: Components, steps: int, shape: Sequence[int] | None = None) -> list[float]:
        shift = self.shift(components)
        if is_dynamic(components["scheduler"].config):
            shift = dynamic_shift(IMAGE_TOKENS if shape is None else shape[-1] * shape[-2], steps)
        return flow.get_sigmas(steps, shift)

    def student_components(self, components: Components) -> Components:
        return {"scheduler": fixed(components["scheduler"])}

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        return flux2_vae.encode_images(vae, images)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return flux2_vae.decode_latents(vae, latents)

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        text, tokenizer = components["text_encoder"].config, components["tokenizer"]
        yield from vocabulary_mismatches("tokenizer", tokenizer, text.vocab_size)
        yield from chat_template_mismatches(tokenizer)
        if text.num_hidden_layers < LAYERS[-1]:
            yield "text_encoder", f"it has {text.num_hidden_layers} layers; prompts are encoded by layer {LAYERS[-1]}"
        transformer = components.get("transformer")
        if transformer is None:
            return
        config, vae = transformer.config, components["vae"].config
        if config["guidance_embeds"] or config["patch_size"] != self.patch_size:
            yield (
                "transformer",
                "guidance_embeds, and patches of more than a pixel, are not supported; klein has neither",
            )
        if (found := len(LAYERS) * text.hidden_size) != (needed := config["joint_attention_dim"]):
            yield "text_encoder", f"{len(LAYERS)} hidden states have {found} features, the transformer takes {needed}"
        if (found := vae["latent_channels"] * flux2_vae.PATCH**2) != (needed := config["in_channels"]):
            yield "vae", f"a token of its latents has {found} channels, the transformer takes {needed}"

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
        if index.get("is_distilled"):
            config = GenerationConfig(steps=4, guidance_scale=0.0, guidance_distilled=True)
            return config, "FLUX.2 [klein]"
        return GenerationConfig(steps=STEPS, guidance_scale=3.0), "FLUX.2 [klein] base"  # diffusers' scale is 4


FLUX2 = Flux2Family()
