"""A model of shapes alone, for estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.models.components import load_component, read_config
from fewstep.models.consistency import check_components
from fewstep.models.family import resolve_family
from fewstep.models.generation_config import load_generation_config
from fewstep.models.pipeline import TextToImagePipeline


def meta_pipeline(folder: Path, dtype: torch.dtype) -> TextToImagePipeline:
    """A model with modules on the meta device, from the configurations in a folder: shapes without weights.

    Tokenizers are None. Errors as for :func:`load`.
    """
    family = resolve_family(folder)
    components: dict[str, Any] = dict.fromkeys(family.others)
    components["scheduler"] = load_component(folder, "scheduler", family=family)
    for name in family.modules:
        with torch.device("meta"):
            module = family.build(name, read_config(folder, name))
        # nn.Module's own method: diffusers' would warn about dtypes of real weights
        components[name] = nn.Module.to(module, dtype).eval().requires_grad_(False)
    check_components(folder, family, components)
    return TextToImagePipeline(family, components, load_generation_config(folder))
