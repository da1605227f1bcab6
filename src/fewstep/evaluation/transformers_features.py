"""CLIP, DINOv2 and Inception features through transformers, from a local path or a hub id.

Images are prepared by the checkpoint's own image processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.checkpoints import load_checkpoint, load_processor

BATCH_SIZE = 32


class TransformersFeatures:
    """
    Args:
        name: shown beside figures.
        select: the model's output -> features [B, D].
    """

    def __init__(
        self, name: str, model: nn.Module, processor: Any, select: Callable[[Any], Tensor], device: torch.device | str
    ) -> None:
        self.name, self.model, self.processor, self.select = name, model.to(device), processor, select
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, progress: Callable[[int], object] | None = None) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, D]."""
        found = []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [Image.fromarray(image.numpy()) for image in images[start : start + BATCH_SIZE].cpu()]
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"].to(self.device)
            found.append(self.select(self.model(pixel_values=pixels)).float().cpu())
            if progress is not None:
                progress(len(batch))
        return torch.cat(found)


def clip_features(checkpoint: str, device: torch.device | str) -> TransformersFeatures:
    """Projected image embeddings of CLIP (arXiv 2103.00020)."""
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    model = load_checkpoint(CLIPVisionModelWithProjection, checkpoint)
    processor = load_processor(AutoImageProcessor, checkpoint)
    return TransformersFeatures("clip", model, processor, lambda out: out.image_embeds, device)


def dinov2_features(checkpoint: str, device: torch.device | str) -> TransformersFeatures:
    """The class token of DINOv2 (arXiv 2304.07193), as in FD-DINOv2 (arXiv 2306.04675)."""
    from transformers import AutoImageProcessor, Dinov2Model

    model, processor = load_checkpoint(Dinov2Model, checkpoint), load_processor(AutoImageProcessor, checkpoint)
    return TransformersFeatures("dinov2", model, processor, lambda out: out.pooler_output, device)


def inception_features(checkpoint: str, device: torch.device | str) -> TransformersFeatures:
    """Pooled features of timm's Inception v3 through transformers' wrapper; not the TensorFlow weights of published
    FIDs."""
    try:
        import timm  # noqa: F401
    except ImportError:
        raise UserError("features inception: needs timm; pip install timm") from None
    from transformers import AutoImageProcessor, TimmWrapperModel

    model, processor = load_checkpoint(TimmWrapperModel, checkpoint), load_processor(AutoImageProcessor, checkpoint)
    return TransformersFeatures("inception", model, processor, lambda out: out.pooler_output, device)
