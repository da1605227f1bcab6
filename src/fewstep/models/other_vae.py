"""Another autoencoder in place of a model's own: one of the same latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import UserError
from fewstep.models.components import load_component_from, read_config
from fewstep.models.family import ModelFamily
from fewstep.models.vae import to_channels_last

_SAME = ("_class_name", "latent_channels", "scaling_factor", "shift_factor")


def vae_folder(path: str | Path) -> Path:
    """The folder of an autoencoder: itself, or its part of a model's folder. Raises: UserError if it is not there."""
    folder = Path(path).expanduser()
    found = folder / "vae" if (folder / "vae").is_dir() else folder
    if not found.is_dir():
        raise UserError(f"{path}: no such folder; give that of a VAE in diffusers' layout")
    return found


def load_other_vae(path: str | Path, folder: Path, family: ModelFamily, dtype: torch.dtype | None = None) -> Any:
    """Load an autoencoder for the model in ``folder``.

    Args:
        path: of :func:`vae_folder`.
        dtype: of its weights; unset, the stored one.

    Raises:
        UserError: it cannot be read, or its latents are not the model's: other channels, scaling or size.
    """
    other = vae_folder(path)
    _check(other, _latents(other.parent, other.name, family), _latents(folder, "vae", family))
    return to_channels_last(load_component_from(other, "vae", dtype, family))


def _latents(folder: Path, name: str, family: ModelFamily) -> dict[str, Any]:
    """What describes the latents, with the class's defaults."""
    config = read_config(folder, name)
    with torch.device("meta"):
        built: Any = family.build("vae", config).config
    return {
        **{key: built.get(key) for key in _SAME},
        "_class_name": config.get("_class_name"),
        "pixels of one latent pixel's side": 2 ** (len(built["block_out_channels"]) - 1),
    }


def _check(path: Path, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for key, value in own.items():
        if found[key] != value:
            raise UserError(f"{path}: {key} is {found[key]}, that of the model's own VAE {value}; use one that agrees")
