"""fewstep: turns a multi-step flow-matching text-to-image model into an 8-, 4-, 2- or 1-step one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.api import distill, evaluate, generate, load

__all__ = ["distill", "evaluate", "generate", "load"]


def __getattr__(name: str) -> Any:
    """``fewstep.load`` and its like, imported when asked for: torch takes seconds, and ``--help`` should not wait."""
    if name == "load":
        return importlib.import_module("fewstep.api").load
    if name in __all__:  # modules of the same names, which can be called
        return importlib.import_module(f"fewstep.{name}")
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
