"""Plug-ins by "name" or "name:checkpoint": scorers, and the feature networks of evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from fewstep.core.registry import Registry, load_plugins
from fewstep.errors import UserError

#: Name of an entry's first parameter -> what it is, and its form.
_FORMS = {
    "checkpoint": ("a checkpoint", "PATH_OR_HUB_ID"),
    "clip_and_head": ("CLIP L/14 and the head's file", "CLIP+HEAD.safetensors"),
    "endpoint": ("the endpoint and its model", "URL#MODEL"),
    "function": ("a callable", "MODULE:FUNCTION"),
    "reward": ("a reward", "REWARD"),
}


def needs_checkpoint(make: Callable[..., Any]) -> bool:
    """Whether the class or function has a parameter without a default, which is its checkpoint."""
    return any(each.default is inspect.Parameter.empty and each.name != "device" for each in _named_parameters(make))


def open_plugin(registry: Registry[Any], spec: str, device: torch.device | str = "cpu") -> Any:
    """An instance of the entry that ``spec`` names: "name", or "name:checkpoint" with a local path or hub id.

    The checkpoint is the entry's first argument. An entry with a parameter ``device`` also gets the device.

    Raises:
        UserError: there is no such entry, it needs a checkpoint and none is given, or it takes none and one is given.
    """
    load_plugins()
    name, _, checkpoint = spec.partition(":")
    make = registry.get(name)
    parameters = {each.name: each.kind for each in _named_parameters(make)}
    if needs_checkpoint(make) and not checkpoint:
        form = next((form for key, form in _FORMS.items() if key in parameters), ("an argument", "ARGUMENT"))
        raise UserError(f"{registry.kind} {name}: give {form[0]}, as in {name}:{form[1]}")
    takes_checkpoint = any(
        kind is not inspect.Parameter.KEYWORD_ONLY for key, kind in parameters.items() if key != "device"
    )
    if checkpoint and not takes_checkpoint:
        raise UserError(f"{registry.kind} {spec}: it takes no checkpoint; write {name}")
    arguments = [checkpoint] if checkpoint else []
    return make(*arguments, **({"device": device} if "device" in parameters else {}))


def _named_parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in inspect.signature(make).parameters.values() if each.kind not in variadic]
