"""Registries: what a name in a recipe or on the command line stands for.

Methods, loss terms, model families, prompt sources, image sources, training sets, scorers, rewards and feature networks
register themselves when their module is imported. ``load_plugins`` imports the modules that do: those of fewstep,
those of installed packages (entry points of the group "fewstep"), and those named in the environment variable
FEWSTEP_PLUGINS.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from fewstep.errors import UserError

T = TypeVar("T")

#: Modules of this package that register something.
BUILTIN_PLUGINS = (
    "fewstep.methods",
    "fewstep.models.families",
    "fewstep.rewards.plugins",
    "fewstep.evaluation.plugins",
    "fewstep.preferences",
    "fewstep.emoji",
)


class Registry(Generic[T]):
    """Named entries of one kind.

    An entry is registered as an object, or as "module:attribute", which is imported when it is first looked up.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}

    def register(self, name: str, entry: T | str | None = None) -> Callable[[Any], Any]:
        """Register ``entry``, or decorate a class or function: ``@registry.register("name")``.

        Raises:
            ValueError: another entry has this name.
        """
        if entry is not None:
            if self._entries.setdefault(name, entry) is not entry and self._entries[name] != entry:
                raise ValueError(f"two entries register the {self.kind} {name!r}")
            return lambda value: value

        def decorate(value: Any) -> Any:
            if self._entries.get(name) == f"{value.__module__}:{value.__qualname__}":
                self._entries[name] = value  # listed by name before its module was imported
            else:
                self.register(name, value)
            return value

        return decorate

    def get(self, name: str) -> T:
        """The entry of this name. Raises: UserError that lists the known names."""
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names()) or 'none'}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry  # type: ignore[return-value]

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries


methods: Registry[Any] = Registry("method")
lora_methods: Registry[Any] = Registry("LoRA method")
loss_terms: Registry[Any] = Registry("loss term")
model_families: Registry[Any] = Registry("model family")
editing_families: Registry[Any] = Registry("family of models that edit by instruction")
prompt_sources: Registry[Any] = Registry("prompt source")
image_sources: Registry[Any] = Registry("image source")
training_sets: Registry[Callable[[Path], None]] = Registry("training set")
scorers: Registry[Any] = Registry("scorer")
rewards: Registry[Any] = Registry("reward")
feature_networks: Registry[Any] = Registry("feature network")
recipe_kinds: Registry[Any] = Registry("recipe kind")
recipe_folders: Registry[Path] = Registry("recipe folder")
commands: Registry[Any] = Registry("command")


@cache
def load_plugins() -> None:
    """Import everything that registers itself, once.

    Raises:
        UserError: a plugin named in FEWSTEP_PLUGINS cannot be imported.
    """
    for module in BUILTIN_PLUGINS:
        importlib.import_module(module)
    for entry_point in entry_points(group="fewstep"):
        entry_point.load()
    for plugin in os.environ.get("FEWSTEP_PLUGINS", "").split(os.pathsep):
        if plugin:
            _import(plugin)


def _import(plugin: str) -> None:
    """Import a module by its name, or a .py file by its path."""
    try:
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            return
        spec = importlib.util.spec_from_file_location(f"fewstep_plugin_{Path(plugin).stem}", plugin)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"FEWSTEP_PLUGINS: {plugin} cannot be imported ({error})") from error
