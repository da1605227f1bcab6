"""Whether a LoRA has an effect: the same image with and without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.inference.generate import generate
from fewstep.models.components import resolve_model
from fewstep.models.lora.merge import merge_, open_loras
from fewstep.models.pipeline import load


def draw_with_and_without(
    model: str, file: str, strength: float, prompt: str, ignore: Sequence[str], device: str
) -> Tensor:
    """The image of a prompt without and with a LoRA, uint8 [2, H, W, 3]. Raises: UserError as for ``load``."""
    loras = open_loras(resolve_model(model), {file: strength}, ignore)  # before the weights are loaded
    pipeline = load(model, device)
    without = generate(pipeline, [prompt]).images
    merge_(pipeline.transformer, loras)
    return torch.cat([without, generate(pipeline, [prompt]).images])
