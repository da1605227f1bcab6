"""The Wan 2.1 family: classes, defaults and folder layout of ``WanPipeline``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5EncoderModel

from fewstep.errors import UserError
from fewstep.models.consistency import Mismatch, text_mismatches
from fewstep.models.family import MODEL_INDEX, Components, LoadingInfo, ModelFamily
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pretrained import build_module, load_pretrained, save_lora
from fewstep.models.wan import vae as wan_vae
from fewstep.models.wan.denoiser import WanDenoiser
from fewstep.models.wan.keys import KEY_LAYOUTS
from fewstep.models.wan.prompts import TOKENS, WanPromptEncoder
from fewstep.models.wan.schedule import open_scheduler, shift_of, sigmas_of, student_scheduler

CLASSES = {"transformer": WanTransformer3DModel, "text_encoder": UMT5EncoderModel, "vae": AutoencoderKLWan}

#: The linear layers of a block: self-attention's and cross-attention's four each, and the feed-forward's two.
BLOCK_LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

#: Settings in ``model_index.json`` of Wan 2.2, which has a second transformer for small noise levels.
_NOT_OF_WAN_21 = ("transformer_2", "boundary_ratio", "expand_timesteps")


class WanFamily(ModelFamily):
    """Wan 2.1 text-to-video: a DiT with cross-attention to UMT5 and a causal 3D autoencoder (arXiv 2503.20314)."""

    pipeline_class = "WanPipeline"
    architecture = "wan2.1"
    patch_size = 2
    lora_target_modules = BLOCK_LINEARS
    quantizable_modules = BLOCK_LINEARS
    key_layouts = KEY_LAYOUTS

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        if name == "transformer":
            check_version(path.parent / MODEL_INDEX)
        return load_pretrained(CLASSES[name], path, dtype)

    def load_other(self, name: str, path: Path) -> Any:
        return open_scheduler(path) if name == "scheduler" else T5Tokenizer.from_pretrained(path)

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        module: Any = build_module(CLASSES[name], config)
        if name == "transformer":
            rope = module.rope
            with torch.device("cpu"):  # not weights: these must have values also where weights are on the meta device
                module.rope = WanRotaryPosEmbed(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
        built: nn.Module = module
        return built

    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        WanPipeline(**components).save_config(folder)

    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save_lora(WanPipeline, folder, weights)

    def denoiser(self, transformer: WanTransformer3DModel) -> WanDenoiser:
        return WanDenoiser(transformer)

    def prompt_encoder(self, components: Components, system_prompt: str = "") -> WanPromptEncoder:
        return WanPromptEncoder(components["tokenizer"], components["text_encoder"], system_prompt, max_tokens=TOKENS)

    def prompt_features(self, components: Components) -> int:
        return int(components["transformer"].config["text_dim"])

    def latent_multiple(self, components: Components) -> int:
        return int(components["vae"].config["scale_factor_spatial"]) * self.patch_size

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        factor = int(components["vae"].config["scale_factor_spatial"])
        return int(components["transformer"].config["in_channels"]), height // factor, width // factor

    def frame_multiple(self, components: Components) -> int:
        return int(components["vae"].config["scale_factor_temporal"])

    def shift(self, components: Components) -> float:
        return shift_of(components["scheduler"].config)

    def sigmas(self, components: Components, steps: int, shape: Sequence[int] | None = None) -> list[float]:
        return sigmas_of(components["scheduler"], steps)

    def student_components(self, components: Components) -> Components:
        return {"scheduler": student_scheduler(self.shift(components))}

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        return wan_vae.encode(vae, images)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return wan_vae.decode(vae, latents)

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        transformer = components.get("transformer")
        yield from text_mismatches(components, None if transformer is None else self.prompt_features(components))
        if transformer is None:
            return
        config, vae = transformer.config, components["vae"].config
        if tuple(config["patch_size"]) != (1, self.patch_size, self.patch_size):
            yield "transformer", f"patch_size {list(config['patch_size'])} is not supported; only [1, 2, 2] is"
        if config["image_dim"] is not None or config["added_kv_proj_dim"] is not None:
            yield "transformer", "it takes an image (image_dim, added_kv_proj_dim); only text-to-video is supported"
        if vae["patch_size"] is not None:
            yield "vae", "it has patches of pixels, as Wan 2.2's; only Wan 2.1's is supported"
        if vae["z_dim"] != config["in_channels"]:
            yield "vae", f"its latents have {vae['z_dim']} channels, the transformer takes {config['in_channels']}"
        for name in ("latents_mean", "latents_std"):
            if len(vae[name]) != vae["z_dim"]:
                yield "vae", f"{name} has {len(vae[name])} numbers; its latents have {vae['z_dim']} channels"

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        # diffusers' defaults; its guidance_scale is 5
        return GenerationConfig(steps=50, guidance_scale=4.0, height=480, width=832, frames=81), "Wan 2.1"


def check_version(index: Path) -> None:
    """Refuse Wan 2.2. Raises: UserError that names the setting."""
    if not index.exists():
        return
    settings = json.loads(index.read_text(encoding="utf-8"))
    for name in _NOT_OF_WAN_21:
        value = settings.get(name)
        if value not in (None, False, [None, None]):
            raise UserError(f"{index}: {name} {json.dumps(value)} is not supported; only Wan 2.1 is")


WAN = WanFamily()
