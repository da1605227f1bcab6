import subprocess
import sys

import pytest

HELD = """
import torch
from fewstep.training.allocator import keep_freed_memory

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

torch.ones(1)
if {keep}:
    keep_freed_memory()
before = megabytes()
blocks = [torch.ones(40_000_000) for _ in range(3)]
del blocks
print(megabytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
@pytest.mark.parametrize(("keep", "low", "high"), [(False, -50, 50), (True, 400, 600)])
def test_freed_memory_stays(keep: bool, low: float, high: float) -> None:
    """Of 480 MB that were given back; in a process of its own, because there is no way back."""
    script = HELD.format(keep=keep)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert low < float(done.stdout) < high
