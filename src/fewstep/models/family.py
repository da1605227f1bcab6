"""Model families: everything that depends on a model's architecture, behind one interface.

A family is one folder under ``models/``, registered in ``models/families.py`` (or by a plug-in) under the
``_class_name`` that its folders have in ``model_index.json``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fewstep.core import flow
from fewstep.core.registry import editing_families, load_plugins, model_families
from fewstep.errors import UserError
from fewstep.models import vae as vae_tools
from fewstep.models.consistency import Mismatch
from fewstep.models.denoiser import TransformerDenoiser
from fewstep.models.key_layout import KeyLayout, ProgramNames
from fewstep.models.library_logs import silence_loggers
from fewstep.models.text import PromptEncoder

if TYPE_CHECKING:
    from fewstep.models.generation_config import GenerationConfig

MODEL_INDEX = "model_index.json"

#: A model's components by name: modules, tokenizer, scheduler.
Components = Mapping[str, Any]

#: What a loader reports: "missing_keys", "unexpected_keys", "mismatched_keys" (key, found shape, expected shape).
LoadingInfo = Mapping[str, Any]


class ModelFamily(ABC):
    """One architecture.

    Attributes:
        pipeline_class: ``_class_name`` in ``model_index.json``.
        modules: names of the components with weights; "transformer", "text_encoder" and "vae" are required.
        others: names of the components without; "scheduler" is required.
        prompt_components: names of those of the prompt encoder; "text_encoder" and "tokenizer" are required.
        patch_size: of the transformer, in latent pixels.
        lora_target_modules: endings of the names of the linear layers that LoRA adapts by default.
        quantizable_modules: endings of the names of the linear layers that fp8 quantizes.
        key_layouts: names of tensors in single files, by format; empty if the family has none.
        programs: its names in ComfyUI and stable-diffusion.cpp; None if they are not known.
        architecture: its ID in the headers of LoRA files (ModelSpec).
        prompt_tokens: length of every encoded prompt; None where it depends on the prompt.
        fp16: whether fp16 weights work; they do not where activations overflow.
        attention_backends: whether the transformer computes attention with the backends of diffusers.
    """

    pipeline_class: str
    modules: tuple[str, ...] = ("transformer", "text_encoder", "vae")
    others: tuple[str, ...] = ("tokenizer", "scheduler")
    prompt_components: tuple[str, ...] = ("text_encoder", "tokenizer")
    patch_size: int
    lora_target_modules: tuple[str, ...]
    quantizable_modules: tuple[str, ...]
    key_layouts: Mapping[str, KeyLayout] = {}
    programs: ProgramNames | None = None
    architecture: str
    prompt_tokens: int | None = None
    fp16 = False
    attention_backends = True

    @property
    def component_names(self) -> tuple[str, ...]:
        return (*self.modules, *self.others)

    @abstractmethod
    def load_module(self, name: str, path: Path, dtype: Any) -> tuple[nn.Module, LoadingInfo]:
        """Load a component with weights from its folder; ``components.load_component`` checks the report."""

    @abstractmethod
    def load_other(self, name: str, path: Path) -> Any:
        """Load a component without weights from its folder.

        Raises:
            UserError: it has settings that would not be obeyed (``models.scheduler`` checks those of a scheduler).
        """

    @abstractmethod
    def build(self, name: str, config: Mapping[str, Any]) -> nn.Module:
        """A component with fresh weights from its ``config.json``; without any under ``torch.device("meta")``."""

    def save_component(self, name: str, component: Any, path: Path) -> None:
        """Write a component into its folder."""
        component.save_pretrained(path)

    @abstractmethod
    def write_index(self, components: Components, folder: Path, config: GenerationConfig) -> None:
        """Write ``model_index.json``.

        Args:
            config: how the model is sampled.
        """

    @abstractmethod
    def write_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write an adapter's weights (``adapter_files.adapter_state_dict``) as the family's pipeline loads them."""

    @abstractmethod
    def denoiser(self, transformer: Any) -> TransformerDenoiser:
        """The transformer as a denoiser."""

    @abstractmethod
    def prompt_encoder(self, components: Components, system_prompt: str = "") -> PromptEncoder:
        """The encoder of prompts; needs ``prompt_components``."""

    @abstractmethod
    def prompt_features(self, components: Components) -> int:
        """Dimension D of encoded prompts [B, L, D], from the transformer's configuration."""

    @abstractmethod
    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latent of one image whose sides are multiples of ``latent_multiple``: channels, rows, columns;
        without the batch, and without the frames of a video."""

    @abstractmethod
    def latent_multiple(self, components: Components) -> int:
        """Pixels that the sides of an image must be a multiple of: what one patch of the latent covers."""

    @abstractmethod
    def infer_generation_config(self, components: Components, folder: Path) -> tuple[GenerationConfig, str]:
        """How a folder without ``fewstep.json`` is sampled, from its scheduler and ``model_index.json``, and the name
        of the model it is taken for."""

    def mismatches(self, components: Components) -> Iterator[Mismatch]:
        """Components that do not fit the others, by name, each with the reason (``consistency.check_components``).

        Args:
            components: all of them, or those of the prompt encoder alone.
        """
        return iter(())

    def frame_multiple(self, components: Components) -> int | None:
        """Frames of a video that one frame of its latent covers, after the first, which is alone; None for a family of
        images, whose latents have no such dimension."""
        return None

    def shift(self, components: Components) -> float:
        """The shift of the noise levels (``core.flow.shift_sigma``)."""
        return float(components["scheduler"].config["shift"])

    def sigmas(self, components: Components, steps: int, shape: Sequence[int] | None = None) -> list[float]:
        """The noise levels of ``steps`` steps, from 1 to the terminal 0, of a model whose own are not stored.

        Args:
            shape: of the latent, where the levels depend on it; None is that of a default size.
        """
        return flow.get_sigmas(steps, self.shift(components))

    def student_components(self, components: Components) -> Components:
        """Components that a student has in place of its teacher's; without any where ``shift`` is a constant."""
        return {}

    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], or videos [B, 3, F, H, W] -> latents [B, C, ..., rows, columns]."""
        return vae_tools.encode_images(vae, images)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B, C, ..., rows, columns] -> images [B, 3, H, W] in [0, 1], or videos [B, 3, F, H, W]."""
        return vae_tools.decode_latents(vae, latents)


def resolve_family(folder: Path) -> ModelFamily:
    """The family of a model's folder, by ``_class_name`` in its ``model_index.json``.

    Raises:
        UserError: the file cannot be read, or no family has this name.
    """
    return get_family(read_pipeline_class(folder), where=str(folder / MODEL_INDEX))


def resolve_any_family(folder: Path) -> ModelFamily:
    """The family of a model's folder, that of a model that edits images by instruction included
    (``models.editor``). Errors as for :func:`resolve_family`."""
    name = read_pipeline_class(folder)
    load_plugins()
    if name not in editing_families:
        return get_family(name, where=str(folder / MODEL_INDEX))
    with silence_loggers():
        family: ModelFamily = editing_families.get(name)
    return family


def read_pipeline_class(folder: Path) -> str:
    """``_class_name`` in a folder's ``model_index.json``. Raises: UserError if it cannot be read."""
    file = folder / MODEL_INDEX
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: no _class_name can be read ({error})") from None


def get_family(pipeline_class: str, where: str = "model family") -> ModelFamily:
    """A family by the name of its pipeline. Raises: UserError that lists the known names."""
    load_plugins()
    if pipeline_class in editing_families:
        raise UserError(
            f"{where}: {pipeline_class} edits images by instruction alone: fewstep generate with --edit FILE"
        )
    if pipeline_class not in model_families:
        known = ", ".join(model_families.names())
        raise UserError(f"{where}: {pipeline_class!r} is not a supported pipeline; supported: {known}")
    with silence_loggers():  # its module imports diffusers' pipeline, which may warn about packages it has no use for
        family: ModelFamily = model_families.get(pipeline_class)
    return family
