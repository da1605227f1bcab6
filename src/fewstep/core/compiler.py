"""What ``torch.compile`` needs, checked beforehand: its own errors are tracebacks of the first step."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch

from fewstep.errors import UserError


def compiles(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether a model on this device is compiled; "auto" is where there is what the compiler needs."""
    if setting != "auto":
        return setting
    try:
        check_compiler(device, "compile")
    except UserError:
        return False
    return True


def eager() -> AbstractContextManager[None]:
    """Inside, compiled functions run uncompiled: what runs a few times, at shapes of its own, is not worth it."""
    return torch.compiler.set_stance("force_eager")


def check_compiler(device: torch.device, setting: str) -> None:
    """
    Args:
        setting: what asks for the compiler, for the message.

    Raises:
        UserError: there is no C++ compiler or no Python.h (on a CPU), or no Triton, no C compiler for it, or too old a
            GPU.
    """
    if device.type == "cpu":
        from torch._inductor import config

        name = os.environ.get("CXX") or next(filter(None, config.cpp.cxx))
        if _missing(name):
            raise UserError(f"{setting}: {name} is missing; install a C++ compiler, or set {setting} to false")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        if not header.is_file():
            raise UserError(f"{setting}: {header} is missing; install Python's headers, or set {setting} to false")
    elif device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
            gpu = torch.cuda.get_device_name(device)
            raise UserError(f"{setting}: {gpu} is older than compute capability 7.0; set {setting} to false")
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"{setting}: Triton is missing; install triton, or set {setting} to false")
        if all(_missing(name) for name in ([os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
            raise UserError(f"{setting}: Triton needs gcc or clang; install one, or set {setting} to false")


def _missing(command: str) -> bool:
    """Whether there is no such program; a command may have arguments, as ``ccache g++`` has."""
    words = shlex.split(command)
    return not words or shutil.which(words[0]) is None
