"""Weights of rewards: a local folder or a hub id, safetensors only, or shapes alone on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.machine import reading
from fewstep.models.checkpoints import load_checkpoint
from fewstep.models.components import download
from fewstep.models.library_logs import silence_loggers

_DOWNLOADED = ["*.json", "*.txt", "*.safetensors"]
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.ckpt")


def reward_folder(checkpoint: str) -> Path:
    """The folder of a checkpoint: a local one, or that of a hub id, downloaded unless cached.

    Raises:
        UserError: there is no such folder, and it cannot be downloaded.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") != 1:
        raise UserError(f"{checkpoint}: no such folder; give one, or a hub id, OWNER/NAME")
    return download(checkpoint, _DOWNLOADED)


def read_tensors(folder: Path, key: str, what: str) -> dict[str, Tensor]:
    """The tensors of the safetensors file in a folder that has a tensor of this name, with any prefix.

    Raises:
        UserError: no file has it, or one is damaged. For pickled weights the message says how to convert them.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with reading(file, "download it again"):
            tensors = load_file(file)
        if any(name == key or name.endswith(f".{key}") for name in tensors):
            return tensors
    pickled = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if files:
        raise UserError(f"{folder}: no {what}: no safetensors file in it has the tensor {key}")
    if pickled:
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which can run code and is not read; convert its tensors, under the "
            "same names, to a safetensors file, as docs/guides/rewards.md shows"
        )
    raise UserError(f"{folder}: no {what}: there is no safetensors file in it")


def load_model(model_class: Any, checkpoint: str, device: torch.device | str) -> nn.Module:
    """A frozen model of a transformers class in fp32; on the meta device, its shapes without its weights.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    if torch.device(device).type != "meta":
        return load_checkpoint(model_class, checkpoint).to(device)
    try:
        with silence_loggers():
            config = model_class.config_class.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{checkpoint}: its config.json cannot be read: {first}") from None
    with torch.device("meta"):
        model: nn.Module = model_class(config).eval().requires_grad_(False)
    return model


def fill(module: nn.Module, weights: dict[str, Tensor], where: Path | str) -> nn.Module:
    """``module`` with these weights in fp32, frozen, in eval mode.

    Raises:
        UserError: weights are missing or have another shape; other tensors are ignored.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{where}: the tensor {name} of {type(module).__name__} is missing")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{where}: {name} has the shape {tuple(weights[name].shape)}, and {tuple(tensor.shape)} is needed"
            )
    module.load_state_dict({name: weights[name].float() for name in expected}, assign=True)
    return module.eval().requires_grad_(False)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.nbytes for module in modules for p in module.parameters())
