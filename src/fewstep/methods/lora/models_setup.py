"""The models of a LoRA training: frozen ones with adapters, quantized, compiled and checkpointed as a recipe says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from fewstep.config.lora_recipe import AdapterSettings, LoraModelsSettings, LoraRecipe
from fewstep.core.compiler import compiles
from fewstep.methods.lora.base import LoraModels
from fewstep.models.adapters import AdapterDenoiser, add_adapter, copy_adapter
from fewstep.models.lora.bind import read_lora
from fewstep.models.lora.targets import model_targets
from fewstep.models.lora.trained import add_frozen_adapter, init_adapter, target_layers
from fewstep.models.lora.weights import Lora
from fewstep.models.nf4 import quantize_nf4_
from fewstep.models.offload import offload_blocks
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.quantize import quantize_fp8_

LORA = "lora"  # the adapter that is saved
ADDED = "training_adapter"  # what is added while training
COPY = "trained_copy"  # on the same model; ParameterDict, which LoKr uses, has a method "copy"
TEACHER = "teacher"  # the second model's, trained or from a file


@dataclass(frozen=True)
class LoraFiles:
    """LoRA files that a recipe names, each bound to its model.

    Attributes:
        added: ``method.added_lora``. teacher: ``method.teacher_lora``. init: ``adapter.init``.
    """

    added: Lora | None = None
    teacher: Lora | None = None
    init: Lora | None = None

    @classmethod
    def read(cls, recipe: LoraRecipe, model: Path, teacher: Path | None) -> Self:
        """Read them for the models in two folders. Raises: UserError if one cannot be read, or is of another model."""

        def read(file: str | None, folder: Path | None) -> Lora | None:
            return None if file is None or folder is None else read_lora(Path(file).expanduser(), model_targets(folder))

        method = recipe.method
        return cls(read(method.added_lora, model), read(method.teacher_lora, teacher), read(recipe.adapter.init, model))


def frozen_dtype(settings: LoraModelsSettings) -> torch.dtype:
    """The data type in which frozen weights are loaded; fp8 and nf4 are made of bf16."""
    return torch.float32 if settings.frozen_dtype == "fp32" else torch.bfloat16


def build_lora_models(
    recipe: LoraRecipe,
    model: TextToImagePipeline,
    device: torch.device,
    teacher: TextToImagePipeline | None = None,
    files: LoraFiles = LoraFiles(),  # frozen
) -> LoraModels:
    """Give models their adapters, and move their transformers to ``device``; ``model`` then generates with the adapter
    that is trained.

    Args:
        teacher: the method's second model, in ``frozen_dtype``.
        files: the LoRA files that the recipe names.

    Raises:
        UserError: ``adapter.target_modules`` has an ending that matches no layer, or a file does not fit.
    """
    base, method, always = model.denoiser, recipe.method, {}
    if files.added is not None:
        add_frozen_adapter(model.transformer, ADDED, files.added)
        always = {ADDED: method.added_strength}
    _add(model, LORA, recipe.adapter)
    if files.init is not None:
        init_adapter(model.transformer, LORA, files.init)
    if method.copied:
        _add(model, COPY, recipe.adapter)
        copy_adapter(model.transformer, LORA, COPY)
    _prepare(model, recipe.models, device)
    model.denoiser = AdapterDenoiser(base, {LORA: 1.0})  # type: ignore[assignment]
    denoisers = {COPY: AdapterDenoiser(base, {**always, COPY: 1.0})} if method.copied else {}
    if teacher is not None:
        fixed: dict[str, float] = {}
        if files.teacher is not None:
            add_frozen_adapter(teacher.transformer, TEACHER, files.teacher)
            fixed = {TEACHER: 1.0}
        for name in method.teacher_adapters:
            _add(teacher, name, recipe.adapter)
        _prepare(teacher, recipe.models, device)
        names = dict.fromkeys([*fixed, *method.teacher_adapters])
        denoisers |= {name: AdapterDenoiser(teacher.denoiser, {**fixed, name: 1.0}) for name in names}
    return LoraModels(model, AdapterDenoiser(base, {**always, LORA: 1.0}), teacher, denoisers)


@contextmanager
def without_adapters(model: TextToImagePipeline) -> Iterator[None]:
    """Inside, ``model`` generates with none of its adapters."""
    denoiser = model.denoiser
    base = denoiser.base if isinstance(denoiser, AdapterDenoiser) else denoiser
    model.denoiser = AdapterDenoiser(base, {})  # type: ignore[assignment]
    try:
        yield
    finally:
        model.denoiser = denoiser


def _add(model: TextToImagePipeline, name: str, settings: AdapterSettings) -> None:
    endings = settings.target_modules or list(model.family.lora_target_modules)
    layers = target_layers(model.transformer, endings, settings.refiners)
    add_adapter(
        *(model.transformer, name, settings.rank, settings.alpha),
        target_modules=layers,
        kind=settings.kind,
        factor=settings.factor,
    )


def _prepare(model: TextToImagePipeline, settings: LoraModelsSettings, device: torch.device) -> None:
    if settings.frozen_dtype == "fp8":
        quantize_fp8_(model.transformer, model.family.quantizable_modules)
    if settings.frozen_dtype == "nf4":
        quantize_nf4_(model.transformer, model.family.quantizable_modules)
    if settings.offload_blocks:
        offload_blocks(model.denoiser, device)
    else:
        model.transformer.to(device)
    if compiles(settings.compile, device):
        model.denoiser.compile_repeated_blocks()
    if settings.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
