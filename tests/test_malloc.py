import subprocess
import sys

import pytest

HELD = """
import torch
from fewstep.training.malloc import malloc_trim, retain_freed_memory

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

torch.ones(1)
if {keep}:
    retain_freed_memory()
before = megabytes()
blocks = [torch.ones(40_000_000) for _ in range(3)]
del blocks
if {back}:
    malloc_trim()
print(megabytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.parametrize(
    ("keep", "back", "low", "high"), [(False, False, -50, 50), (True, False, 400, 600), (True, True, -50, 50)]
)
def test_freed_memory_is_retained_until_trimmed(keep: bool, back: bool, low: float, high: float) -> None:
    """480 MB are freed, in a separate process: the setting cannot be undone."""
    script = HELD.format(keep=keep, back=back)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert low < float(done.stdout) < high
