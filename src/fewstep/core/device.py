"""The device a user named, checked before anything is loaded on it."""

from __future__ import annotations

import torch

from fewstep.errors import UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of a GPU or of the CPU is not sufficient."""
    # the CPU's allocator raises a plain RuntimeError, and so does torch where a size does not even fit 64 bits
    signs = ("not enough memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)


def check_device(device: torch.device | str) -> torch.device:
    """The device, on which torch can allocate tensors here.

    Raises:
        UserError: it is not a device's name, or this machine or this build of torch has no such device.
    """
    try:
        opened = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device}: not a device; use cpu, cuda, cuda:1, ...") from None
    try:
        torch.empty(1, device=opened).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"device {device}: not available here ({reason}); use cpu") from None
    return opened
