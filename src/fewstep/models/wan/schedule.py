"""Wan's noise levels, with the schedulers of diffusers that its folders have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMapEulerDiscreteScheduler, UniPCMultistepScheduler

from fewstep.core import flow
from fewstep.errors import UserError
from fewstep.models.scheduler import SCHEDULER_CONFIG, check_shift, euler_sigmas, load_scheduler, read_settings

TIMESTEPS = 1000  # training levels

#: What a UniPC scheduler of a flow-matching model must have; its solver's settings are not used.
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": TIMESTEPS}


def open_scheduler(path: Path) -> Any:
    """The scheduler in a component's folder: UniPC in the released models, Euler's method, or a student's.

    Raises:
        UserError: it cannot be read, or has a setting that fewstep would not obey.
    """
    file = path / SCHEDULER_CONFIG
    config = read_settings(file)
    name = config.get("_class_name")
    if name == UniPCMultistepScheduler.__name__:
        for key, value in _FLOW.items():
            if config.get(key) != value:
                found = json.dumps(config.get(key))
                raise UserError(f"{file}: {key} {found} is not supported; only {json.dumps(value)} is")
        check_shift(config, file, "flow_shift")
        return UniPCMultistepScheduler.from_pretrained(path)
    if name == FlowMapEulerDiscreteScheduler.__name__:
        check_shift(config, file)
        return FlowMapEulerDiscreteScheduler.from_pretrained(path)
    return load_scheduler(path)


def student_scheduler(shift: float) -> FlowMapEulerDiscreteScheduler:
    """A scheduler whose levels are even before the shift, as a student's are: ``WanPipeline`` takes no others."""
    with torch.device("cpu"):  # its levels must have values also where weights are on the meta device
        return FlowMapEulerDiscreteScheduler(shift=shift)


def shift_of(config: Mapping[str, Any]) -> float:
    """The shift of a scheduler."""
    return float(config["flow_shift"] if "flow_shift" in config else config["shift"])


def sigmas_of(scheduler: Any, steps: int) -> list[float]:
    """The levels that diffusers' scheduler has for so many steps, from 1 to the terminal 0.

    UniPC's are even from 1 down to the smallest training level before the shift, without that one.
    """
    shift = shift_of(scheduler.config)
    if isinstance(scheduler, UniPCMultistepScheduler):
        return flow.sigmas_from_timesteps([1 - (1 - 1 / TIMESTEPS) * i / steps for i in range(steps)], shift)
    if isinstance(scheduler, FlowMapEulerDiscreteScheduler):
        return flow.get_sigmas(steps, shift)
    return euler_sigmas(steps, shift)
