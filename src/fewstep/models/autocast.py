"""Autocast, where it would do harm: for devices that have it, and those that don't."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, operations compute in the precision of what they are given."""
    if not autocasts(device):
        return nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return off
