"""CLIP score (arXiv 2104.08718) through transformers: 100 times the cosine of image and prompt, at least 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.models.checkpoints import load_checkpoint, load_processor

BATCH_SIZE = 32


class CLIPScore:
    """
    Args:
        checkpoint: a CLIP model with its processor: a local path, or a hub id.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """

    name = "clip_score"

    def __init__(self, checkpoint: str, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.device = device
        self.processor = load_processor(CLIPProcessor, checkpoint)
        model: Any = load_checkpoint(CLIPModel, checkpoint)
        self.model = model.to(device)
        # Not every checkpoint's tokenizer has a maximal length, beyond which the text encoder fails.
        self.max_tokens: int = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """clip_score [N] in [0, 100]; images: uint8 [N, H, W, 3]. Longer prompts than CLIP takes are truncated."""
        scores = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [Image.fromarray(image.numpy()) for image in images[start : start + BATCH_SIZE].cpu()]
            texts = list(prompts[start : start + BATCH_SIZE])
            inputs = self.processor(
                text=texts,
                images=batch,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
            )
            out = self.model(**inputs.to(self.device))
            scores.append(torch.cosine_similarity(out.image_embeds, out.text_embeds).float().cpu())
        return {"clip_score": 100 * torch.cat(scores).clamp(min=0)}
