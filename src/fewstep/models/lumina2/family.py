"""The Lumina 2 family: classes, defaults and folder layout of ``Lumina2Pipeline``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Model, GemmaTokenizer

from fewstep.models.consistency import Mismatch, text_mismatches, vae_mismatches
from fewstep.models.family import Components, LoadingInfo, ModelFamily
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.lumina2.denoiser import Lumina2Denoiser
from fewstep.models.lumina2.keys import KEY_LAYOUTS
from fewstep.models.lumina2.prompts import Lumina2PromptEncoder
from fewstep.models.pretrained import build_module, load_pretrained, save_lora
from fewstep.models.scheduler import load_scheduler
from fewstep.models.vae import vae_scale_factor

#: The linear layers of a block: attention's four and the feed-forward's three.
BLOCK_LINEARS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
)

CLASSES = {"transformer": Lumina2Transformer2DModel, "text_encoder": Gemma2Model, "vae": AutoencoderKL}


class Lumina2Family(ModelFamily):
    """Lumina-Image-2.0: a unified DiT with a Gemma-2 text encoder and a 16-channel VAE (arXiv 2503.21758)."""

    pipeline_class = "Lumina2Pipeline"
    architecture = "lumina-2"
    patch_size = 2
    lora_target_modules = BLOCK_LINEARS
    quantizable_modules = BLOCK_LINEARS
    attention_backends = False
    key_layouts = KEY_LAYOUTS

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        return load_pretrained(CLASSES[name], path, dtype)

    def load_other(self, name: str, path: Path) -> Any:
        return load_scheduler(path) if name == "scheduler" else GemmaTokenizer.from_pretrained(path)

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        module: Any = build_module(CLASSES[name], config)
        if name == "transformer":
            rope = module.rope_embedder
            with torch.device("cpu"):  # not weights: these must have values also where weights are on the meta device
                rope.freqs_cis = rope._precompute_freqs_cis(rope.axes_dim, rope.axes_lens, rope.theta)
        built: nn.Module = module
        return built

    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        Lumina2Pipeline(**components).save_config(folder)

    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_lora(Lumina2Pipeline, folder, weights)

    def denoiser(self, transformer: Lumina2Transformer2DModel) -> Lumina2Denoiser:
        return Lumina2Denoiser(transformer)

    def prompt_encoder(self, components: Components, system_prompt: str = "") -> Lumina2PromptEncoder:
        # diffusers' pipeline truncates prompts to 256 tokens, the system prompt included; longer ones are refused here
        return Lumina2PromptEncoder(components["tokenizer"], components["text_encoder"], system_prompt, max_tokens=256)

    def prompt_features(self, components: Components) -> int:
        return int(components["transformer"].config["cap_feat_dim"])

    def latent_multiple(self, components: Components) -> int:
        return vae_scale_factor(components["vae"]) * self.patch_size

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        factor = vae_scale_factor(components["vae"])
        return components["transformer"].config["in_channels"], height // factor, width // factor

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        transformer = components.get("transformer")
        if transformer is not None:
            yield from vae_mismatches(components["vae"], transformer.config["in_channels"])
            if (patch := transformer.config["patch_size"]) != self.patch_size:
                yield "transformer", f"patch_size {patch} is not supported; only {self.patch_size} is"
        yield from text_mismatches(components, None if transformer is None else self.prompt_features(components))

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        return GenerationConfig(guidance_scale=3.0), "Lumina-Image-2.0"  # diffusers' guidance_scale is 4


LUMINA2 = Lumina2Family()
