"""How the C library hands out memory while a training runs on the CPU."""

import ctypes
import sys

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """From here on freed memory stays with the process: glibc gives large blocks back to the system at once, and every
    next tensor is then paid for again, page by page. A Decoupled-DMD step on a CPU takes about a tenth
    less time without that (docs/performance.md), at the same peak. Elsewhere than on glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _NEVER)
        mallopt(_TRIM_THRESHOLD, _NEVER)
