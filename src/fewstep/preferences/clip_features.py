"""CLIP's embeddings (arXiv 2103.00020) of images and prompts, with gradient to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.checkpoints import load_checkpoint, load_processor


class ClipEmbeddings:
    """
    Args:
        checkpoint: a CLIP model with its processor: a local path, or a hub id.

    Raises:
        UserError: it cannot be loaded, or its images are not square.
    """

    def __init__(self, checkpoint: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        processor = load_processor(CLIPProcessor, checkpoint)
        model: Any = load_checkpoint(CLIPModel, checkpoint)
        self.model, self.tokenizer = model.to(device), processor.tokenizer
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        settings = processor.image_processor
        self.edge: int | None = settings.size.get("shortest_edge")
        self.size: int = settings.crop_size.get("height", 0)
        if not self.edge or self.edge < self.size or self.size != model.config.vision_config.image_size:
            raise UserError(f"{checkpoint}: its image processor makes no squares of {self.size} pixels from images")
        mean, std = (torch.tensor(each, device=device) for each in (settings.image_mean, settings.image_std))
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)
        self.parameters = sum(parameter.nbytes for parameter in model.parameters())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, D] of the images, with gradient to them, and of the prompts; longer prompts than CLIP takes
        are truncated. images: [B, 3, H, W] in [0, 1]."""
        pixels = self.preprocess(images.to(self.mean.device))
        tokens = self.tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self.max_tokens
        )
        with torch.no_grad():
            texts = self.model.get_text_features(**tokens.to(self.mean.device)).pooler_output
        found = self.model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(found, dim=-1).to(images.device), F.normalize(texts, dim=-1).to(images.device)

    def preprocess(self, images: Tensor) -> Tensor:
        """The processor's steps in torch: the shorter side is resized, the center cut out, and the pixels normalized.

        The processor's pixels differ by a few 255ths: it rounds and clamps to 8 bits after each of two passes.
        """
        assert self.edge is not None
        height, width = images.shape[-2:]
        short = min(height, width)
        size = self.edge * height // short, self.edge * width // short
        if size != (height, width):
            # bicubic interpolation overshoots; 8-bit images cannot
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        return (images - self.mean) / self.std
