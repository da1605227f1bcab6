"""Damage to weights: functions of a safetensors file that change it."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.files import TRANSFORMER


def renamed(path: Path) -> None:
    os.rename(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["x_pad_token"]
    save_file(tensors, path)


def with_a_tensor(path: Path) -> None:
    save_file(load_file(path) | {"extra": torch.zeros(2)}, path)


def lora(path: Path) -> None:
    save_file({"transformer.layers.0.attention.to_q.lora_A.weight": torch.zeros(2, 2)}, path)


def not_finite(path: Path) -> None:
    """One NaN in the last of the tensors, or all numbers of a new single file."""
    if path.exists():
        tensors = load_file(path)
        name = max(tensors)
        tensors[name].flatten()[-1] = float("nan")
        save_file(tensors, path)
    else:
        save_file({name: torch.full_like(x, float("nan")) for name, x in load_file(TRANSFORMER).items()}, path)
