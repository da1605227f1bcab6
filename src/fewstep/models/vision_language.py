"""Prompts that contain an image: a vision-language model with the language weights of an image model's text encoder.

D-OPSD (arXiv 2605.05204) conditions Z-Image on its training images so: Qwen3-VL-4B and Z-Image's text encoder,
Qwen3-4B, have equal layers, and features of image and caption take the place of the caption's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, Qwen3VLConfig, Qwen3VLModel

from fewstep.core.precision import without_autocast
from fewstep.errors import UserError
from fewstep.models.library_logs import silence_loggers
from fewstep.models.text import PromptEncoder

MAX_TOKENS = 1024  # of an image with its caption; later ones are cut off, as in D-OPSD's code
PIXELS = (512**2, 768**2)  # of the image that the vision encoder sees, likewise
_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"  # in the chat, before the caption


class VisionLanguageEncoder(nn.Module):
    """Encodes an image with its caption as features that replace those of a caption.

    Args:
        model: its language part has the text encoder's weights.
        processor: transformers' image processor.
        encoder: of captions; gives template, tokenizer, and the layer whose hidden states are the features.
    """

    def __init__(self, model: Qwen3VLModel, processor: Any, encoder: PromptEncoder) -> None:
        super().__init__()
        self.model, self.processor, self.encoder = model, processor, encoder

    @torch.no_grad()
    def forward(self, image: Tensor, text: str) -> Tensor:
        """Features [L, D], L at most ``MAX_TOKENS``, in the text encoder's dtype.

        Args:
            image: [3, H, W] in [0, 1].
        """
        device, config = self.model.device, self.model.config
        shown = Image.fromarray((255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy())
        area = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}  # both are areas, whatever the names say
        pixels = self.processor(images=[shown], size=area, return_tensors="pt")
        count = int(pixels.image_grid_thw.prod()) // config.vision_config.spatial_merge_size**2
        before, after = self.encoder.template(_PLACE + text).split(_PLACE, 1)
        start, end = (self.encoder.tokenizer(part).input_ids if part else [] for part in (before, after))
        placed = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
        ids = torch.tensor([[*start, *placed, *end]])
        kinds = torch.zeros_like(ids)
        kinds[0, len(start) + 1 : len(start) + 1 + count] = 1  # of the image, for positions in three axes
        with without_autocast(device):
            states = self.model(
                input_ids=ids.to(device),
                pixel_values=pixels.pixel_values.to(device),
                image_grid_thw=pixels.image_grid_thw.to(device),
                mm_token_type_ids=kinds.to(device),
                output_hidden_states=True,
            ).hidden_states[self.encoder.hidden_state]
        return states[0, :MAX_TOKENS].clone()


def vision_language_folder(name: str) -> Path:
    """The folder of a vision-language model. Raises: UserError if there is none."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no vision-language model found (config.json is missing); give a folder of Qwen3-VL")
    return folder


def open_vision_language_encoder(folder: Path, encoder: PromptEncoder) -> VisionLanguageEncoder:
    """Qwen3-VL from a folder in transformers' layout, with the weights of a text encoder, which it shares.

    Raises:
        UserError: there is no such model, or the text encoder is another one.
    """
    text_encoder = encoder.text_encoder
    if getattr(text_encoder.config, "model_type", "") != "qwen3":
        raise UserError(f"{folder}: a vision-language model is used with a Qwen3 text encoder alone, which Z-Image has")
    try:
        with silence_loggers():
            config = Qwen3VLConfig.from_pretrained(folder, local_files_only=True)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = Qwen3VLModel.from_pretrained(
                folder, config=config, dtype=text_encoder.dtype, use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # libraries raise many types for a bad folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no Qwen3-VL can be loaded ({reason})") from None
    try:
        model.language_model.load_state_dict(text_encoder.state_dict(), assign=True)
    except RuntimeError:
        raise UserError(
            f"{folder}: its language part has other layers than the model's text encoder; give the Qwen3-VL of its "
            "size (Z-Image: Qwen3-VL-4B)"
        ) from None
    return VisionLanguageEncoder(model.eval().requires_grad_(False), processor, encoder)
