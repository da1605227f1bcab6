"""The scheduler of a flow-matching model: only its shift is used, so any setting that would change the noise levels
otherwise is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.core import flow
from fewstep.errors import UserError
from fewstep.models.family import MODEL_INDEX

SCHEDULER_CONFIG = "scheduler_config.json"

#: Values with which a setting changes nothing, as in diffusers' defaults; other values are not supported.
NEUTRAL: Mapping[str, Any] = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "num_train_timesteps": 1000,  # what the pipelines convert timesteps with
}

#: What the settings above would use: without effect while these are neutral.
_UNUSED = {"shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}


def load_scheduler(path: Path, dynamic: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler in a component's folder.

    Args:
        dynamic: whether the family computes a shift that depends on the image's size.

    Raises:
        UserError: it cannot be read, is of another class, or has a setting that fewstep would not obey.
    """
    file, index = path / SCHEDULER_CONFIG, path.parent / MODEL_INDEX
    config = read_settings(file)
    check_scheduler({**config, "use_dynamic_shifting": False} if dynamic else config, file)
    if index.exists() and "scheduler" in (
        entries := read_settings(index)
    ):  # diffusers opens the class that the index names
        check_scheduler({"_class_name": entries["scheduler"][-1]}, index)
    scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path)
    return scheduler


def check_scheduler(config: Mapping[str, Any], file: Path) -> None:
    """Raises: UserError that names the file and the first setting that is not supported."""
    expected = FlowMatchEulerDiscreteScheduler.__name__
    found = config.get("_class_name", expected)
    if found != expected:
        raise UserError(f"{file}: _class_name {found} is not supported; use a model with {expected}")
    for key, value in config.items():
        known = key.startswith("_") or key in _UNUSED
        # settings of other diffusers versions count as off where they are null or false
        if not known and value != NEUTRAL.get(key) and (key in NEUTRAL or value not in (None, False)):
            supported = json.dumps(NEUTRAL.get(key))
            raise UserError(f"{file}: {key} {json.dumps(value)} is not supported; only {supported} is")
    check_shift(config, file)


def check_shift(config: Mapping[str, Any], file: Path, key: str = "shift") -> None:
    """Raises: UserError if the shift in a scheduler's settings is not a positive number."""
    shift = config.get(key, 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise UserError(f"{file}: {key} {json.dumps(shift)} is not a positive number")


def euler_sigmas(steps: int, shift: float) -> list[float]:
    """The levels of ``FlowMatchEulerDiscreteScheduler`` where a pipeline gives it none: even from 1 to the smallest of
    1,000 training levels, before the shift; with the terminal 0."""
    last = flow.shift_sigma(1 / NEUTRAL["num_train_timesteps"], shift)
    return flow.sigmas_from_timesteps([1 - (1 - last) * i / max(steps - 1, 1) for i in range(steps)], shift)


def read_settings(file: Path) -> dict[str, Any]:
    """A component's settings. Raises: UserError if the file cannot be read."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a mapping of settings to values")
    return config
