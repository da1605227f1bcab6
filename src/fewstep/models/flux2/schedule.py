"""FLUX.2's noise levels: a shift that grows with the image and falls with the number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.errors import UserError
from fewstep.models.scheduler import SCHEDULER_CONFIG, load_scheduler

TOKENS, STEPS = 4096, 50  # of 1024 x 1024 pixels in the steps of klein base: where one shift must do
LARGE = 4300  # tokens above which the number of steps does not matter


def dynamic_shift(tokens: int, steps: int) -> float:
    """The shift for an image of so many tokens: exp of diffusers' ``compute_empirical_mu``, which lies on a line
    through fits for 10 and for 200 steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > LARGE:
        return math.exp(at_200)
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return math.exp(slope * steps + at_200 - 200 * slope)


def is_dynamic(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's shift depends on the image's size."""
    return bool(config.get("use_dynamic_shifting"))


def open_scheduler(path: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler in a component's folder: a dynamic one of this family, or one with a fixed shift.

    Raises:
        UserError: it cannot be read, or has a setting that fewstep would not obey.
    """
    scheduler = load_scheduler(path, dynamic=True)
    kind = scheduler.config.get("time_shift_type", "exponential")
    if is_dynamic(scheduler.config) and kind != "exponential":
        raise UserError(f"{path / SCHEDULER_CONFIG}: time_shift_type {kind!r} is not supported; only exponential is")
    return scheduler


def fixed(scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler whose shift is the same for all sizes and numbers of steps; diffusers' pipeline obeys it."""
    if not is_dynamic(scheduler.config):
        return scheduler
    return FlowMatchEulerDiscreteScheduler(shift=dynamic_shift(TOKENS, STEPS))
