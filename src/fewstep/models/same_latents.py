"""Whether two models have the same latents, so that one can take the other's transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.models.components import read_config
from fewstep.models.family import resolve_family
from fewstep.models.pipeline import TextToImagePipeline


def check_same_latents(model: TextToImagePipeline, folder: Path, named: str) -> None:
    """Check that the latents of the model in ``folder`` have the scale of another's.

    Args:
        named: the folder in the message.

    Raises:
        UserError: they have another one.
    """
    with torch.device("meta"):  # its configuration with the defaults of its class, without weights
        vae: Any = resolve_family(folder).build("vae", read_config(folder, "vae"))
    for name in ("scaling_factor", "shift_factor"):
        own, other = model.vae.config.get(name), vae.config.get(name)
        if own != other:
            raise UserError(
                f"{named} has other latents: {name} is {other} in its vae/config.json, expected {own}; take a model "
                "with the same autoencoder"
            )
