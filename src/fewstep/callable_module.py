"""Lets ``fewstep.generate(...)`` be called while ``fewstep.generate`` stays the module that holds the function.

Three functions of the API have the names of the packages behind them. A module's class may be replaced (Python's data
model, "Customizing module attribute access"); one with ``__call__`` serves both uses.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that, called, is the API's function of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module("fewstep.api"), self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)


def make_callable(module: str) -> None:
    sys.modules[module].__class__ = CallableModule
