"""Z-Image-Omni and Z-Image-Edit: the classes and folder layout of ``ZImageOmniPipeline``.

Beside the prompt the transformer takes each image twice: as latents at noise level 0, and as features of SigLIP2.
diffusers' pipeline and transformer do all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageOmniPipeline, ZImageTransformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from torch import nn
from transformers import Siglip2ImageProcessor, Siglip2VisionModel

from fewstep.errors import UserError
from fewstep.models.consistency import Mismatch, text_mismatches, vae_mismatches
from fewstep.models.editor import EditingFamily
from fewstep.models.family import Components, LoadingInfo
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.pretrained import build_module, load_pretrained
from fewstep.models.text import tokenize
from fewstep.models.zimage.family import ZImageFamily, check_transformer

#: Pixels of an image beyond which the pipeline makes it smaller.
MAX_AREA = 1024 * 1024

#: Tokens of a prompt with its template; the pipeline cuts longer ones.
MAX_TOKENS = 512

#: What is around the prompt in the pipeline's template, between the last image and the one to draw.
INSTRUCTION = ("<|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n<|vision_start|>")


class ZImageOmniFamily(ZImageFamily, EditingFamily):
    """Z-Image's S3-DiT with the image inputs of Z-Image-Omni and Z-Image-Edit."""

    pipeline_class = "ZImageOmniPipeline"
    modules = ("transformer", "text_encoder", "vae", "siglip")
    others = ("tokenizer", "scheduler", "siglip_processor")
    max_images = 4  # the pipeline has no limit of its own; an image of 1024 x 1024 adds over 4,000 tokens to each step

    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        if name == "siglip":
            return load_pretrained(Siglip2VisionModel, path, dtype)
        if name == "transformer":
            config, file = ZImageTransformer2DModel.load_config(path, local_files_only=True), path / "config.json"
            _check_omni_transformer(config, file)
            return load_pretrained(ZImageTransformer2DModel, path, dtype)
        # the pipeline encodes images in bf16, whatever the weights are
        return super().load_module(name, path, torch.bfloat16 if name == "vae" else dtype)

    def load_other(self, name: str, path: Path) -> Any:
        return (
            Siglip2ImageProcessor.from_pretrained(path)
            if name == "siglip_processor"
            else super().load_other(name, path)
        )

    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        if name == "siglip":
            return build_module(Siglip2VisionModel, config)
        if name == "transformer":
            _check_omni_transformer(config, Path(name) / "config.json")
            return build_module(ZImageTransformer2DModel, config)
        return super().build(name, config)

    def open_pipeline(self, components: Components) -> ZImageOmniPipeline:
        return ZImageOmniPipeline(**components)

    def check_instruction(self, components: Components, text: str) -> None:
        tokenize(components["tokenizer"], [text], [INSTRUCTION[0] + text + INSTRUCTION[1]], MAX_TOKENS)

    def check_image(self, name: str, image: Image.Image) -> None:
        try:
            Flux2ImageProcessor.check_image_input(image)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    def default_size(self, image: Image.Image, multiple: int) -> tuple[int, int]:
        """As the pipeline finds it: the image's own, at most ``MAX_AREA`` pixels."""
        width, height = image.size
        if width * height > MAX_AREA:
            scale = math.sqrt(MAX_AREA / (width * height))
            width, height = int(width * scale), int(height * scale)
        return width // multiple * multiple, height // multiple * multiple

    def max_side(self, components: Components) -> int:
        return min(components["transformer"].config["axes_lens"][1:]) * self.latent_multiple(components)

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        config, siglip = components["transformer"].config, components["siglip"].config
        yield from vae_mismatches(components["vae"], config["in_channels"])
        yield from text_mismatches(components, self.prompt_features(components))
        if siglip.hidden_size != config["siglip_feat_dim"]:
            found = f"its features have {siglip.hidden_size} numbers"
            yield "siglip", f"{found}, the transformer takes {config['siglip_feat_dim']}"
        if (found := components["siglip_processor"].patch_size) != siglip.patch_size:
            yield "siglip_processor", f"its patches have {found} pixels, those of siglip {siglip.patch_size}"

    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        return GenerationConfig(steps=50, guidance_scale=5.0), "Z-Image-Omni"  # the pipeline's defaults


def _check_omni_transformer(config: Mapping[str, Any], file: Path) -> None:
    """Raises: UserError as :func:`check_transformer`, or if the transformer takes no features of images."""
    features = config.get("siglip_feat_dim")
    if not isinstance(features, int) or isinstance(features, bool) or features < 1:
        raise UserError(
            f"{file}: siglip_feat_dim {json.dumps(features)} is not supported; give that of siglip's features"
        )
    check_transformer({**config, "siglip_feat_dim": None}, file)


OMNI = ZImageOmniFamily()
