"""Distillations of a tiny model by real processes: command lines, runs, and the weights that they leave."""

import os
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

OPTIONS = [
    *("train.batch_size=4", "train.log_every=1", "train.save_every=2", "train.sample_every=0"),
    *("train.precision=fp32", "method.fake_score_updates=2", "method.fake_score_start=0", "student.steps=2"),
    *("evaluate.enabled=false", "evaluate.validate_every=0"),
    "method.terms={cfg_augmentation: {}, distribution_matching: {}}",
    *("optim.student.lr_schedule=constant", "optim.student.min_lr_ratio=0", "optim.student.lr=2.0e-4"),
]


def launcher(processes, restarts=0):
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
    ]
    return [] if processes == 1 else several


def command(folder, out, processes, *more, restarts=0):
    launch = launcher(processes, restarts)
    settings = [word for option in (f"teacher={folder}", *OPTIONS, *more) for word in ("-s", option)]
    return [sys.executable, *launch, "-m", "fewstep", "distill", "micro-aligned", "--out", str(out), *settings]


def distill(folder, out, processes, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(folder, out, processes, *more), env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def weights(out):
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def wait_for_checkpoint(process, run, seconds=180):
    """Return when a started run has its first checkpoint; fail if its process ends before."""
    deadline = time.monotonic() + seconds
    while not list(run.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, (process.stderr or process.stdout).read()[-3000:]
        time.sleep(0.05)
