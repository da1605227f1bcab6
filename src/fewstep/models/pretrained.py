"""Classes of diffusers and transformers, as families load, build and write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewstep.atomic import atomic_folder
from fewstep.models.family import LoadingInfo


def load_pretrained(cls: Any, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
    """A module from its folder, of weights in safetensors, with the loader's report; wrong shapes are in it too."""
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    if issubclass(cls, PreTrainedModel):
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options["torch_dtype"] = dtype
    loaded: tuple[nn.Module, LoadingInfo] = cls.from_pretrained(path, **options)
    return loaded


def build_module(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """A module with fresh weights from its configuration."""
    built: nn.Module = (
        cls(cls.config_class(**config)) if issubclass(cls, PreTrainedModel) else cls.from_config(dict(config))
    )
    return built


def save_lora(pipeline: type[DiffusionPipeline], folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter's weights as a pipeline of diffusers loads them."""
    with atomic_folder(folder) as aside:
        pipeline.save_lora_weights(aside, transformer_lora_layers=dict(weights))  # type: ignore[attr-defined]
