"""Opens what is served: first all checks, then the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fewstep.core.device import resolve_device
from fewstep.errors import UserError
from fewstep.inference.enhancer import OWN, enhancer_for, open_answers
from fewstep.inference.image_extras import Extras, UsedFile
from fewstep.models.components import BUNDLED_MODELS, resolve_model
from fewstep.models.editor import edits_by_instruction, load_editor
from fewstep.models.fingerprint import model_fingerprint
from fewstep.models.generation_config import GENERATION_CONFIG, load_generation_config
from fewstep.models.language_model import check_language_head, text_encoder_with_head
from fewstep.models.lora.targets import model_targets
from fewstep.models.other_vae import vae_folder
from fewstep.models.pipeline import load
from fewstep.serve.loras import LoraFolder
from fewstep.serve.settings import ServedModel, ServeSettings

if TYPE_CHECKING:
    from fewstep.serve.service import Service


def prepare(served: ServedModel, settings: ServeSettings) -> Callable[[], Service]:
    """Check everything that can be checked before a model is loaded.

    Returns: loads the model, which takes long, and returns its service.

    Raises:
        UserError: a package is missing, or the model, its configuration or LoRA files cannot be used.
    """
    try:
        from fewstep.serve.safety import SafetyFilter
        from fewstep.serve.service import Service
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}: pip install 'fewstep[serve]'") from None
    if served.lora_dir is not None and served.dtype == "fp8":
        raise UserError("--lora-dir: LoRA files cannot be changed in weights in fp8; give --dtype bf16")
    folder = resolve_model(served.model)
    if edits_by_instruction(folder):
        return _prepare_editor(folder, served, settings)
    _check_images(folder)
    loras = None if served.lora_dir is None else LoraFolder(served.lora_dir, model_targets(folder))
    extras = Extras(vae=None if served.vae is None else _named_vae(served.vae))
    safety_filter = None if served.safety_filter is None else SafetyFilter(served.safety_filter)
    answers = None
    if served.enhancer == OWN:
        check_language_head(folder)
    elif served.enhancer is not None:
        answers = open_answers(served.enhancer, resolve_device(served.device))

    def load_service() -> Service:
        pipeline = load(folder, served.device, _torch_dtype(served.dtype), vae=served.vae)
        own = served.enhancer == OWN
        language = text_encoder_with_head(folder, pipeline.text_encoder, pipeline.tokenizer) if own else answers
        revises = None if language is None else enhancer_for(folder, language)
        fingerprint = model_fingerprint(folder)
        return Service(
            pipeline, _name(folder, served), fingerprint, settings, served.dtype, loras, revises, safety_filter, extras
        )

    return load_service


def _check_images(folder: Path) -> None:
    """Raises: UserError if the model makes videos."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading the model gives them again
        frames = load_generation_config(folder).frames
    if frames > 1:
        raise UserError(
            f"{folder}: makes videos of {frames} frames, which are not served; set frames to 1 in its "
            f"{GENERATION_CONFIG}, or use fewstep generate"
        )


def _prepare_editor(folder: Path, served: ServedModel, settings: ServeSettings) -> Callable[[], Service]:
    """:func:`prepare` for a model that edits images by instruction."""
    from fewstep.serve.safety import SafetyFilter
    from fewstep.serve.service import Service

    refused = {"--lora-dir": served.lora_dir, "--vae": served.vae, "--enhancer": served.enhancer}
    for option, value in refused.items():
        if value is not None:
            raise UserError(f"{option}: has no effect with a model that edits by instruction; leave it out")
    safety_filter = None if served.safety_filter is None else SafetyFilter(served.safety_filter)

    def load_service() -> Service:
        editor, fingerprint = load_editor(folder, served.device, _torch_dtype(served.dtype)), model_fingerprint(folder)
        name = _name(folder, served)
        return Service(editor, name, fingerprint, settings, served.dtype, safety_filter=safety_filter)

    return load_service


def _name(folder: Path, served: ServedModel) -> str:
    """The model's name in the API."""
    return served.model if served.model in BUNDLED_MODELS else folder.resolve().name


def _named_vae(vae: str) -> UsedFile:
    """For the images' files, without the path, which is not the clients' business. Raises: UserError."""
    folder = vae_folder(vae)
    return UsedFile.of(str(folder)).model_copy(update={"path": folder.name})


def _torch_dtype(name: str | None) -> torch.dtype | None:
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp16": torch.float16}
    return None if name is None else names[name]
