"""Real shortages of storage, for tests: files that cannot grow, and a folder that nobody can write into."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: A folder in which not even the superuser can make a file.
UNWRITABLE = Path("/proc/self/net")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond ``size`` bytes, as on a full disk or at a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
