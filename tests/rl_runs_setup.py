"""Runs of reinforcement learning in subprocesses, and what they logged."""

import json
import os
import subprocess
import sys
from pathlib import Path


def lines(run: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def run_processes(recipe: str, folder: Path, overrides: list[str], count: int) -> list[dict[str, float]]:
    """The metrics of a distillation on ``count`` processes."""
    tests, out = str(Path(__file__).parent), folder / str(count)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    launch = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    settings = [word for option in overrides for word in ("-s", option)]
    words = [sys.executable, *launch, "-m", "fewstep", "distill", recipe, "--out", str(out), *settings]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return lines(out)
