"""Evaluation networks from transformers: a local path or a hub id, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fewstep.errors import UserError
from fewstep.models.components import silence_loggers
from fewstep.models.file_kinds import describe_tensors
from fewstep.models.weight_files import tensor_names, weight_files


def load_checkpoint(model_class: Any, checkpoint: str) -> nn.Module:
    """A frozen model of a transformers class, in eval mode and fp32.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    _check_folder(checkpoint)
    try:
        with silence_loggers():
            model, report = model_class.from_pretrained(checkpoint, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = _first_line(error)
        if Path(checkpoint).is_dir():
            try:
                weight_files(Path(checkpoint))
            except UserError as absent:  # it says which files are there in place of weights
                reason = str(absent)
        raise UserError(f"{checkpoint}: cannot be loaded as {model_class.__name__}: {reason}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        names = tensor_names(Path(checkpoint)) if Path(checkpoint).is_dir() else set()
        if (kind := describe_tensors(names, model.state_dict().keys())) is not None:
            raise UserError(f"{checkpoint}: seems to be {kind}; {model_class.__name__} is needed")
        raise UserError(
            f"{checkpoint}: {len(missing)} weights of {model_class.__name__} are missing: {missing[0]}, ..."
        )
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def load_processor(processor_class: Any, checkpoint: str) -> Any:
    """A checkpoint's own preprocessing. Raises: UserError."""
    _check_folder(checkpoint)
    try:
        with silence_loggers():
            return processor_class.from_pretrained(checkpoint)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{checkpoint}: no {processor_class.__name__} can be loaded: {_first_line(error)}") from None


def _check_folder(checkpoint: str) -> None:
    """Raises: UserError for a path without a folder, which transformers would take for a malformed hub id."""
    path = Path(checkpoint)
    if (path.is_absolute() or checkpoint.startswith(".")) and not path.is_dir():
        raise UserError(f"{checkpoint}: no such folder")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
