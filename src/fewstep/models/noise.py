"""Initial noise by seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.models.pipeline import TextToImagePipeline


def initial_noise(model: TextToImagePipeline, seeds: Sequence[int], height: int, width: int, frames: int = 1) -> Tensor:
    """Pure noise [B, *latent_shape] on the model's device, as diffusers draws it: row i from
    ``torch.Generator("cpu").manual_seed(seeds[i])``."""
    shape = model.latent_shape(height, width, frames)
    each = [torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.cat(each).to(model.device)
