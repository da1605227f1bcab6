"""Evaluation networks from transformers: a local path or a hub id, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fewstep.errors import UserError
from fewstep.models.components import HUB_ID, download, silence_loggers
from fewstep.models.file_kinds import describe_tensors
from fewstep.models.weight_files import tensor_names, weight_files


def load_checkpoint(model_class: Any, checkpoint: str) -> nn.Module:
    """A frozen model of a transformers class, in eval mode and fp32.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    source = _checked(checkpoint)
    try:
        with silence_loggers():
            model, report = model_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = _first_line(error)
        if Path(source).is_dir():
            try:
                weight_files(Path(source))
            except UserError as absent:  # it says which files are there in place of weights
                reason = str(absent)
        raise UserError(f"{checkpoint}: cannot be loaded as {model_class.__name__}: {reason}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        names = tensor_names(Path(source)) if Path(source).is_dir() else set()
        if (kind := describe_tensors(names, model.state_dict().keys())) is not None:
            raise UserError(f"{checkpoint}: seems to be {kind}; {model_class.__name__} is needed")
        raise UserError(
            f"{checkpoint}: {len(missing)} weights of {model_class.__name__} are missing: {missing[0]}, ..."
        )
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def load_processor(processor_class: Any, checkpoint: str) -> Any:
    """A checkpoint's own preprocessing. Raises: UserError."""
    source = _checked(checkpoint)
    try:
        with silence_loggers():
            return processor_class.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{checkpoint}: no {processor_class.__name__} can be loaded: {_first_line(error)}") from None


def _checked(checkpoint: str) -> str:
    """A local folder, or a hub id whose configuration could be downloaded or is in the hub's cache.

    transformers would take other text for a hub id, try it for minutes, and explain its own settings.

    Raises:
        UserError: there is no such checkpoint.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return str(folder)
    if HUB_ID.fullmatch(checkpoint) and not folder.parent.exists():
        repository = checkpoint.removeprefix("hf:")
        download(repository, ["config.json"])
        return repository
    raise UserError(f"{checkpoint}: no such folder; give one, or a hub id, OWNER/NAME")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
