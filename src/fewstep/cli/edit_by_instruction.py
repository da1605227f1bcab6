"""`fewstep generate --edit`: what is checked before the model is loaded, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import typer
from PIL import Image

from fewstep.cli.input_files import InputFiles
from fewstep.cli.options import was_given
from fewstep.errors import UserError
from fewstep.inference.instruction import check_supported, read_images
from fewstep.inference.params import SamplingParams
from fewstep.models.attention_backends import use_attention_backend
from fewstep.models.components import resolve_model
from fewstep.models.editor import ImageEditor, load_editor, resolve_editing_family, size_multiple

#: Options of `fewstep generate` that such a model has no use for.
_REFUSED = (
    *("image", "strength", "mask", "enhance", "system_prompt", "assistant_prefix", "batch_size", "cache"),
    *("vae", "offload", "compile", "aot"),
)


def open_images(
    context: typer.Context, model: str, files: Sequence[str], params: SamplingParams
) -> tuple[list[Image.Image], SamplingParams]:
    """The images to edit, and the parameters with the size of the result.

    Args:
        model: its name or folder.

    Raises:
        UserError: the model does not edit by instruction, an option has no effect on such an edit, or an image cannot
            be used.
    """
    folder = resolve_model(model)
    family = resolve_editing_family(folder)
    for name in _REFUSED:
        if was_given(context, name):
            raise UserError(f"--{name.replace('_', '-')}: has no effect with --edit; leave it out")
    check_supported(params)
    images = read_images(files, family)
    width, height = family.default_size(images[-1], size_multiple(folder))
    return images, params.model_copy(update={"width": params.width or width, "height": params.height or height})


def open_editor(
    model: str,
    files: InputFiles,
    device: str,
    dtype: torch.dtype | None,
    attention_backend: str | None,
    vae_tiling: bool,
) -> ImageEditor:
    """The model with its LoRA files, and the options for speed and memory. Errors as for ``load_editor``."""
    editor = load_editor(model, device, dtype, files.loras, files.ignored)
    transformer = editor.components["transformer"]
    if attention_backend is not None:
        use_attention_backend(transformer, attention_backend, editor.device, transformer.dtype)
    if vae_tiling:
        editor.components["vae"].enable_tiling()
    return editor
