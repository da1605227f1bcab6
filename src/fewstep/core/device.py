"""Which device to compute on: the one that a user names, or the best one here."""

from __future__ import annotations

from functools import cache

import torch

from fewstep.errors import UserError
from fewstep.progress import log_line

#: Names the device that :func:`default_device` finds; the default of all commands and of the Python API.
AUTO = "auto"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a GPU or of the CPU is not sufficient."""
    # the CPU's allocator raises a plain RuntimeError, and so does torch where a size does not even fit 64 bits
    signs = ("not enough memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def default_device() -> torch.device:
    """The current CUDA device where torch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_device(device: torch.device | str = AUTO) -> torch.device:
    """The device of a name, whether this machine has it or not.

    Args:
        device: "auto", or a device by torch's names: cpu, cuda, cuda:1, ...

    Raises:
        UserError: it is not a device's name.
    """
    try:
        return default_device() if device == AUTO else torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device}: not a device; use auto, cpu, cuda, cuda:1, ...") from None


def resolve_device(device: torch.device | str = AUTO) -> torch.device:
    """The device, on which torch can allocate tensors here. Argument as for :func:`parse_device`.

    Raises:
        UserError: it is not a device's name, or this machine or this build of torch has no such device.
    """
    opened = parse_device(device)
    try:
        torch.empty(1, device=opened).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"device {device}: not available here ({reason}); use cpu") from None
    return opened


@cache
def log_device(device: torch.device) -> None:
    """One line that names the device; once for each device in a process."""
    if device.type == "cuda":
        log_line(f"device: {device} ({torch.cuda.get_device_name(device)})")
    else:
        log_line(f"device: {device}" + ("" if torch.cuda.is_available() else " (no CUDA device is available)"))
