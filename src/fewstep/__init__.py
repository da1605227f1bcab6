"""fewstep: turns a multi-step flow-matching text-to-image model into an 8-, 4-, 2- or 1-step one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.api import distill, evaluate, generate, load

__all__ = ["distill", "evaluate", "generate", "load"]


def __getattr__(name: str) -> Any:
    """The functions of the API, imported on first use: torch takes seconds, which ``--help`` does not need."""
    if name in __all__:
        return getattr(importlib.import_module("fewstep.api"), name)
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
