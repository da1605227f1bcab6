"""The C library's memory allocation during training on the CPU."""

import ctypes
import sys
from collections.abc import Callable

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def retain_freed_memory() -> None:
    """Keep freed memory in the process. By default glibc returns large blocks to the system at once, and the next
    tensor pays for its pages again: a Decoupled-DMD step on a CPU takes about a tenth less time this way, at the same
    peak (docs/lab-notes/performance.md). Without glibc this changes nothing.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def malloc_trim() -> None:
    """Return freed memory to the system: between two trainings, whose tensors have other sizes and would not all fit
    into the first one's gaps."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found
