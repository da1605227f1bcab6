"""A model that edits images by instruction: its family, and its components in diffusers' own pipeline.

Such a model cannot be trained or exported here: its transformer takes more than ``core.denoiser`` passes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.core import flow
from fewstep.core.device import AUTO, log_device, resolve_device
from fewstep.core.precision import warn_if_weights_are_emulated
from fewstep.core.registry import editing_families, load_plugins
from fewstep.errors import UserError
from fewstep.models.components import load_component, read_config, resolve_model
from fewstep.models.consistency import check_components
from fewstep.models.family import Components, ModelFamily, read_pipeline_class, resolve_any_family
from fewstep.models.generation_config import GenerationConfig, load_generation_config
from fewstep.models.library_logs import silence_loggers
from fewstep.models.lora.merge import merge_, open_loras
from fewstep.models.quantize import FP8


class EditingFamily(ModelFamily):
    """The family of a model that edits images by instruction, registered in ``core.registry.editing_families``.

    Attributes:
        max_images: that one edit may have.
    """

    max_images: int

    @abstractmethod
    def open_pipeline(self, components: Components) -> Any:
        """diffusers' pipeline, with the arguments of ``ZImageOmniPipeline``."""

    @abstractmethod
    def check_instruction(self, components: Components, text: str) -> None:
        """Raises: UserError if the pipeline would cut the text, or it is not valid Unicode."""

    @abstractmethod
    def check_image(self, name: str, image: Image.Image) -> None:
        """Raises: UserError, with the name, if the pipeline refuses this image."""

    @abstractmethod
    def default_size(self, image: Image.Image, multiple: int) -> tuple[int, int]:
        """Width and height of the edit of an image in pixels, multiples of ``multiple``."""

    @abstractmethod
    def max_side(self, components: Components) -> int:
        """Pixels of the longest side that the transformer has positions for."""


@dataclass(frozen=True)
class ImageEditor:
    """Attributes:
    components: by the family's names.
    pipeline: diffusers' pipeline around them.
    """

    family: EditingFamily
    components: Components
    generation_config: GenerationConfig
    pipeline: Any

    @property
    def device(self) -> torch.device:
        return next(self.components["transformer"].parameters()).device

    @property
    def latent_multiple(self) -> int:
        """Pixels that the sides of an image must be a multiple of."""
        return self.family.latent_multiple(self.components)

    def sigmas(self, steps: int) -> list[float]:
        """The noise levels of ``steps`` steps, from 1 to the terminal 0; those of the generation config where it has
        as many."""
        own = self.generation_config.sigmas
        if own is not None and len(own) == steps + 1:
            return own
        return flow.get_sigmas(steps, self.family.shift(self.components))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latent of one image of these pixels. Raises: UserError for a size that the model cannot take."""
        multiple, longest = self.latent_multiple, self.family.max_side(self.components)
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % multiple:
                raise UserError(f"{name} {side} is not a multiple of {multiple}")
        if max(height, width) > longest:
            raise UserError(f"{width} x {height}: this transformer has positions for sides of at most {longest} pixels")
        return self.family.latent_shape(self.components, height, width)


def edits_by_instruction(folder: Path) -> bool:
    """Whether a folder's model does. Raises: UserError if its ``model_index.json`` cannot be read."""
    load_plugins()
    return read_pipeline_class(folder) in editing_families


def resolve_editing_family(folder: Path) -> EditingFamily:
    """The family of a folder's model. Raises: UserError if it does not edit images by instruction."""
    family = resolve_any_family(folder) if edits_by_instruction(folder) else None
    if not isinstance(family, EditingFamily):
        known = ", ".join(editing_families.names())
        name = read_pipeline_class(folder)
        raise UserError(f"{folder}: {name} does not edit images by instruction; give a model of {known}")
    return family


def size_multiple(folder: Path) -> int:
    """Pixels that the sides of an edit must be a multiple of, without the model's weights. Raises: UserError."""
    family = resolve_editing_family(folder)
    with torch.device("meta"):
        return family.latent_multiple({"vae": family.build("vae", read_config(folder, "vae"))})


def load_editor(
    path_or_name: str | Path,
    device: str | torch.device = AUTO,
    dtype: torch.dtype | None = None,
    loras: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> ImageEditor:
    """Load a model that edits images by instruction: all its weights frozen, in eval mode.

    Args:
        path_or_name: a folder in diffusers' layout, or a Hugging Face hub id.
        device: "auto" is the GPU where there is one, else the CPU.
        dtype: of the weights, fp32 or bf16; unset, each component's stored one. A family may keep single components in
            the one that its pipeline computes in.
        loras: LoRA files with their strengths, merged into the transformer's weights (``models.lora``).
        ignore: keys in these files to leave out; any other key that binds no layer is an error.

    Raises:
        UserError: no such device or model, one that does not edit by instruction, a file that is missing or corrupt, or
            another dtype.
    """
    chosen, folder = resolve_device(device), resolve_model(path_or_name)
    family = resolve_editing_family(folder)
    if dtype == FP8:
        raise UserError("fp8: weights of a model that edits by instruction are in fp32 or bf16")
    adapters = open_loras(folder, loras or {}, ignore)
    components = {name: load_component(folder, name, dtype, family) for name in family.component_names}
    check_components(folder, family, components)
    merge_(components["transformer"], adapters)
    warn_if_weights_are_emulated(components["transformer"], chosen)
    with silence_loggers():
        pipeline = family.open_pipeline(components)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(chosen)
    if device == AUTO:
        log_device(chosen)
    return ImageEditor(family, components, load_generation_config(folder), pipeline)
