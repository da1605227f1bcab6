"""Batches of real latents with their prompts, from a stream of latents and images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.batching import batched, max_decode_batch_size
from fewstep.data.real_samples import RealSample
from fewstep.data.stream_batches import StreamBatches


class RealBatches(StreamBatches[RealSample]):
    """Batches of noise, prompts and one real latent of each prompt; images are encoded when their batch is made."""

    def states(self, items: Sequence[RealSample]) -> Tensor:
        """fp32 [B, 1, C, ..., H, W], on the model's device."""
        latents = torch.empty(len(items), *self.shape)
        for row, item in enumerate(items):
            if item.latent is not None:
                latents[row] = item.latent
        rows = [row for row, item in enumerate(items) if item.pixels is not None]
        images = [item.pixels for item in items if item.pixels is not None]
        for part in batched(len(rows), max_decode_batch_size(*self.model.generation_config.size)):
            pixels = torch.stack(images[part]).to(self.model.device).float() / 255
            with torch.no_grad():
                latents[rows[part]] = self.model.encode_images(pixels).float().cpu()
        return latents[:, None].to(self.model.device)
