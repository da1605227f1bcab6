"""Tokens divided among processes: a training takes the same steps as on one process. Real processes, CPU and gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flux2_setup import save_flux2
from process_runs import assert_close, distill, launcher, weights
from sd3_setup import save_sd3
from test_distribution import losses
from wan_setup import save_wan

from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.methods.models_setup import check_models, check_processes
from fewstep.models.pipeline import load
from fewstep.plan.estimate import plan
from fewstep.training.distributed import DistContext

TRAJECTORIES = ("trajectory.num_trajectories=16", "trajectory.teacher_steps_per_student_step=1")
SMALL = ("resolution=32", "frames=5", "train.on_alert=off")
PROGRAM = Path(__file__).parent / "context_parallel_program.py"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_wan(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def klein(tmp_path_factory):
    return save_flux2(tmp_path_factory.mktemp("models") / "klein", heads=2)


def recipe(folder, *more):
    return load_recipe("micro-turbo", [f"teacher={folder}", *more])


@pytest.mark.parametrize(
    ("family", "frames"),
    [
        ("tiny_folder", 1),
        pytest.param("wan", 1, marks=pytest.mark.slow),
        ("wan", 5),
        pytest.param("klein", 1, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_one_process(request, tmp_path, family, frames):
    processes, folder = 2, request.getfixturevalue(family)
    done = subprocess.run(
        [sys.executable, *launcher(processes), PROGRAM, folder, str(frames), tmp_path / "errors", str(processes)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        errors = json.loads((tmp_path / f"errors-{rank}.json").read_text())
        assert len(errors) > 20
        assert {name: error for name, error in errors.items() if not error < 1e-2} == {}, rank


@pytest.mark.parametrize(
    ("processes", "more"),
    [(2, ()), pytest.param(2, ("models={train: lora, rank: 4, gradient_checkpointing: true}",), marks=pytest.mark.slow),
     pytest.param(4, ("method.terms.mmd={}",), marks=pytest.mark.slow)],
)  # fmt: skip
def test_training_takes_the_steps_of_one_process(wan, tmp_path, processes, more):
    compare(wan, tmp_path, processes, *SMALL, *TRAJECTORIES, *more)


@pytest.mark.slow
def test_training_of_zimage_takes_the_steps_of_one_process(tiny_folder, tmp_path):
    compare(tiny_folder, tmp_path, 2, "method.terms.gan={}", "optim.discriminator={lr: 1.0e-3}", *TRAJECTORIES)


def compare(folder, tmp_path, processes, *more):
    """Two steps of one process, and of several of which each two share samples."""
    distill(folder, tmp_path / "alone", 1, "train.steps=2", *more)
    distill(folder, tmp_path / "several", processes, "train.steps=2", *more, "models.context_parallel=2")
    torch.testing.assert_close(losses(tmp_path / "several"), losses(tmp_path / "alone"), atol=1e-5, rtol=1e-4)
    assert_close(weights(tmp_path / "several"), weights(tmp_path / "alone"))


def test_rows_are_those_of_the_group(recwarn):
    groups = [DistContext(rank, 6, context_parallel=3).shard.rows(8) for rank in range(6)]
    assert groups == [slice(0, 4)] * 3 + [slice(4, 8)] * 3


def test_what_cannot_be_divided_is_refused(wan, tmp_path):
    sd3 = save_sd3(tmp_path / "sd3")
    with pytest.raises(UserError, match=r"models.context_parallel 2 does not divide the number of processes, 1"):
        check_processes(recipe(wan, "models.context_parallel=2"), 1)
    with pytest.raises(UserError, match=r"train.batch_size 32 is not a multiple of the 3 processes"):
        check_processes(recipe(wan, "models.context_parallel=2"), 6)
    with pytest.raises(UserError, match="context_parallel 3 does not divide the transformer's 2 attention heads"):
        check_models(recipe(wan, "models.context_parallel=3"), load(wan))
    with pytest.raises(UserError, match="SD3Transformer2DModel cannot divide its tokens; leave it out"):
        check_models(recipe(sd3, "models.context_parallel=2"), load(sd3))
    with pytest.raises(UserError, match=r"compile: not with models\.context_parallel"):
        recipe(wan, "models.context_parallel=2", "models.compile=true")


def test_plan_divides_the_memory_of_samples(wan):
    """Two GPUs, two samples of half the tokens each, or one whole sample each; and one sample alone."""
    alone, shared, single = (
        plan(recipe(wan, *SMALL, f"train.batch_size={count}", f"models.context_parallel={size}"), gpus=2).memory
        for count, size in ((2, 1), (2, 2), (1, 2))
    )
    assert shared["saved activations"] == pytest.approx(alone["saved activations"], rel=0.02)
    assert single["saved activations"] < 0.55 * shared["saved activations"]
    assert shared["teacher"] == alone["teacher"]
