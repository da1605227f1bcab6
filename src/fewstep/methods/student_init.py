"""What a student starts from in place of the teacher: the recipe's ``init``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fewstep.errors import UserError
from fewstep.models.adapter_files import WEIGHTS_FILE, read_adapter, set_adapter
from fewstep.models.components import load_component, resolve_model
from fewstep.models.pipeline import TextToImagePipeline
from fewstep.models.same_latents import check_same_latents
from fewstep.models.step_adapters import STEP_LORAS, check_one_transformer, has_step_loras

LORA = "lora"  # where a run keeps its student's adapter, beside the student


def load_init(student: TextToImagePipeline, path_or_name: str) -> None:
    """Give the student the transformer of another model of the same architecture; no other component is loaded.

    Raises:
        UserError: there is no such model, its transformer has other shapes, or its latents another scale.
    """
    folder = resolve_model(path_or_name)
    check_one_transformer(folder, "init")
    check_same_latents(student, folder, f"init: {path_or_name}")
    try:
        student.transformer.load_state_dict(load_component(folder, "transformer").state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")  # the first line names the class alone
        raise UserError(f"init: {path_or_name} does not have the teacher's architecture ({reason})") from None


def load_adapters(transformer: nn.Module, names: Sequence[str], scale: float, student: str) -> None:
    """Give the student's adapters the weights of those of an earlier run: each step's own where its student has one
    for each step, else the one beside its student.

    Raises:
        UserError: there are none, or they have another rank, other layers or another number of steps.
    """
    folder = Path(student).expanduser().resolve()
    files = [folder.parent / LORA / WEIGHTS_FILE] * len(names)
    if has_step_loras(folder):
        files = sorted(folder.glob(f"{STEP_LORAS}/*/{WEIGHTS_FILE}"), key=lambda file: int(file.parent.name))
        if len(files) != len(names):
            raise UserError(
                f"init: {folder} has {len(files)} LoRAs, one for each step; this recipe trains {len(names)}"
            )
    for name, file in zip(names, files, strict=True):
        try:
            weights = read_adapter(file)
        except UserError as error:
            raise UserError(
                f"init: {error}; with models.train: lora a student starts from the adapter of an earlier LoRA run, "
                "because all models share the teacher's weights"
            ) from None
        if not set_adapter(transformer, name, weights, scale):
            raise UserError(f"init: {file} has another rank than the recipe's adapter, or other layers")
