"""The Z-Image family: classes, defaults and folder layout of ``ZImagePipeline``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Model

from fewstep.errors import UserError
from fewstep.models.consistency import Mismatch, chat_template_mismatches, text_mismatches, vae_mismatches
from fewstep.models.family import Components, LoadingInfo, ModelFamily
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pretrained import build_module, load_pretrained, save_lora
from fewstep.models.scheduler import load_scheduler
from fewstep.models.text import PromptEncoder
from fewstep.models.vae import vae_scale_factor
from fewstep.models.zimage.denoiser import PATCH_SIZE, ZImageDenoiser
from fewstep.models.zimage.keys import KEY_LAYOUTS, PROGRAMS

TURBO_SHIFT = 3  # Z-Image-Turbo's shift of the noise levels; Z-Image's is 6

CLASSES = {"transformer": ZImageTransformer2DModel, "text_encoder": Qwen3Model, "vae": AutoencoderKL}

#: The linear layers of a block: attention's four and the feed-forward's three.
BLOCK_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def check_transformer(config: Mapping[str, Any], file: Path) -> None:
    """Refuse settings of ``ZImageTransformer2DModel`` that :class:`ZImageDenoiser` does not compute, and settings that
    the class ignores. Raises: UserError that names the file and the setting."""
    known = inspect.signature(ZImageTransformer2DModel.__init__).parameters
    for key, value in config.items():
        if key not in known and not key.startswith("_") and value not in (None, False):
            raise UserError(f"{file}: {key} is not supported: {ZImageTransformer2DModel.__name__} has no such setting")
    supported = {"all_patch_size": [PATCH_SIZE], "all_f_patch_size": [1], "siglip_feat_dim": None, "qk_norm": True}
    for key, only in supported.items():
        value = config.get(key, only)
        if (list(value) if isinstance(value, tuple) else value) != only:
            raise UserError(f"{file}: {key} {json.dumps(value)} is not supported; only {json.dumps(only)} is")


class ZImageFamily(ModelFamily):
    """Z-Image's S3-DiT with a Qwen3 text encoder and a 16-channel VAE (arXiv 2511.22699)."""

    pipeline_class = "ZImagePipeline"
    architecture = "z-image"
    patch_size = PATCH_SIZE
    lora_target_modules = BLOCK_LINEARS
    quantizable_modules = BLOCK_LINEARS
    key_layouts = KEY_LAYOUTS
    programs = PROGRAMS

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        if name == "transformer":
            check_transformer(ZImageTransformer2DModel.load_config(path, local_files_only=True), path / "config.json")
        return load_pretrained(CLASSES[name], path, dtype)

    def load_other(self, name: str, path: Path) -> Any:
        return load_scheduler(path) if name == "scheduler" else Qwen2Tokenizer.from_pretrained(path)

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        if name == "transformer":
            check_transformer(config, Path(name) / "config.json")
        return build_module(CLASSES[name], config)

    def save_component(self, name: str, component: Any, path: Path) -> None:
        known_as = component.config.architectures if name == "text_encoder" else None
        super().save_component(name, component, path)
        if known_as:  # Qwen3ForCausalLM stays known as a language model, whose head is the embeddings
            component.config.architectures = known_as
            component.config.save_pretrained(path)

    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        ZImagePipeline(**components).save_config(folder)

    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_lora(ZImagePipeline, folder, weights)

    def denoiser(self, transformer: ZImageTransformer2DModel) -> ZImageDenoiser:
        return ZImageDenoiser(transformer)

    def prompt_encoder(self, components: Components, system_prompt: str = "") -> PromptEncoder:
        # diffusers' pipeline truncates prompts to 512 tokens; longer ones are refused here
        return PromptEncoder(
            components["tokenizer"], components["text_encoder"], system_prompt, hidden_state=-2, max_tokens=512
        )

    def prompt_features(self, components: Components) -> int:
        dimension: int = components["transformer"].config["cap_feat_dim"]
        return dimension

    def latent_multiple(self, components: Components) -> int:
        return vae_scale_factor(components["vae"]) * self.patch_size

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        factor = vae_scale_factor(components["vae"])
        return components["transformer"].in_channels, height // factor, width // factor

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        transformer = components.get("transformer")
        if transformer is not None:
            yield from vae_mismatches(components["vae"], transformer.config.in_channels)
        yield from text_mismatches(components, None if transformer is None else self.prompt_features(components))
        yield from chat_template_mismatches(components["tokenizer"])

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        if self.shift(components) == TURBO_SHIFT:
            return GenerationConfig(steps=8), "Z-Image-Turbo"
        return GenerationConfig(guidance_scale=4.0), "Z-Image"


ZIMAGE = ZImageFamily()
