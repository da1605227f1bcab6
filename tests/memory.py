"""Peak memory of a function."""

from collections.abc import Callable
from itertools import accumulate

import torch


def peak_bytes(work: Callable[[], object]) -> int:
    """The largest number of bytes that torch's CPU allocator held for a call of `work`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    moves = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return max(accumulate(event.nbytes() for event in sorted(moves, key=lambda event: event.start_ns())), default=0)
