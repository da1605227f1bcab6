"""A model without some of its own components: the prompt encoder alone, or the transformer replaced."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fewstep.core.device import AUTO, log_device, resolve_device
from fewstep.core.precision import warn_if_weights_are_emulated
from fewstep.models.components import resolve_model
from fewstep.models.consistency import check_components
from fewstep.models.family import resolve_family
from fewstep.models.generation_config import GENERATION_CONFIG, load_generation_config
from fewstep.models.pipeline import TextToImagePipeline, load_components
from fewstep.models.text import PromptEncoder


def with_components_from(transformer: nn.Module, path_or_name: str | Path) -> TextToImagePipeline:
    """This transformer with all other components of another model, on the CPU. Errors as for :func:`load`."""
    folder = resolve_model(path_or_name)
    family = resolve_family(folder)
    names = [name for name in family.component_names if name != "transformer"]
    components = {"transformer": transformer, **load_components(folder, family, names)}
    check_components(folder, family, components)
    return TextToImagePipeline(family, components, load_generation_config(folder))


def load_prompt_encoder(
    path_or_name: str | Path, device: str | torch.device = AUTO, dtype: torch.dtype | None = None
) -> PromptEncoder:
    """The prompt encoder of a model without its other components. Arguments and errors as for :func:`load`."""
    chosen = resolve_device(device)
    folder = resolve_model(path_or_name)
    family = resolve_family(folder)
    components = load_components(folder, family, family.prompt_components, dtype)
    check_components(folder, family, components)
    if device == AUTO:
        log_device(chosen)
    has_config = (folder / GENERATION_CONFIG).exists()
    encoder = family.prompt_encoder(components, load_generation_config(folder).system_prompt if has_config else "")
    warn_if_weights_are_emulated(encoder.text_encoder.to(chosen), chosen)
    return encoder
