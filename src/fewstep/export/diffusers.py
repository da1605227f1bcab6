"""Conversion to diffusers' own classes."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.models.family import ModelFamily


def to_diffusers(transformer: Any, family: ModelFamily) -> Any:
    """A plain diffusers transformer that shares the weights of one whose blocks a denoiser has replaced, for use in a
    diffusers pipeline without saving and loading a folder. It must not have LoRA adapters."""
    with torch.device("meta"):
        plain = family.build("transformer", transformer.config)
    for name, parameter in transformer.named_parameters():  # assigning copies the flag from the meta parameter
        plain.get_parameter(name).requires_grad_(parameter.requires_grad)
    plain.load_state_dict(transformer.state_dict(keep_vars=True), assign=True)
    return plain.eval()
