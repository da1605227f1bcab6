"""Several processes take the same steps as one: real processes, started by torchrun, on the CPU with gloo."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from process_runs import assert_close, command, distill, launcher, wait_for_checkpoint, weights
from safetensors.torch import load_file

from fewstep.data.prompt_batches import prompt_batches
from fewstep.errors import UserError
from fewstep.training.distributed import DistContext


def distance(one, other):
    """Of all tensors together, relative to the first ones'."""
    assert one.keys() == other.keys()
    differences = sum((tensor.float() - other[name].float()).square().sum() for name, tensor in one.items())
    return float((differences / sum(tensor.float().square().sum() for tensor in one.values())).sqrt())


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line["student/loss"], line["fake_score/loss"], line["student/grad_norm"]] for line in lines])


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    distill(tiny_folder, out, 1, "train.steps=4")
    return out


def test_two_processes_equal_one_and_their_checkpoint_resumes_in_one(tiny_folder, tmp_path, alone):
    distill(tiny_folder, tmp_path / "two", 2, "train.steps=2")
    distill(tiny_folder, tmp_path / "two", 1, "train.steps=4")
    torch.testing.assert_close(losses(tmp_path / "two"), losses(alone), atol=1e-5, rtol=1e-5)
    assert_close(weights(tmp_path / "two"), weights(alone))


@pytest.mark.slow
def test_damaged_part_of_a_checkpoint_is_skipped(tiny_folder, tmp_path, alone):
    """Two processes, each with its part on disk; a bit of one is flipped, and the checkpoint before is resumed."""
    out = tmp_path / "two"
    distill(tiny_folder, out, 2, "train.steps=3", "train.save_every=1")
    newest = out / "checkpoints" / "step_00000003"
    parts = sorted(newest.glob("shard-*.safetensors"))
    assert len(parts) == 2
    assert not [path for path in newest.iterdir() if path.suffix not in (".safetensors", ".json")]
    data = bytearray(parts[1].read_bytes())
    data[-1] ^= 1
    parts[1].write_bytes(data)
    again = distill(tiny_folder, out, 2, "train.steps=4")
    assert f"skipped, {parts[1].name} is damaged" in again.stderr
    assert "resuming from step 2" in again.stderr
    assert_close(weights(out), weights(alone))


@pytest.mark.slow
def test_two_processes_in_bf16_are_close_to_one(tiny_folder, tmp_path):
    """Weights are sent in bf16 and held in fp32, so that small updates are not lost."""
    for processes in (1, 2):
        more = (
            "train.steps=2",
            "train.precision=bf16",
            "train.sample_every=2",
            "evaluate.validate_every=2",
            "evaluate.validation_prompts=2",
        )
        distill(tiny_folder, tmp_path / str(processes), processes, *more)
    one, two = (losses(tmp_path / run) for run in ("1", "2"))
    torch.testing.assert_close(two, one, atol=0.02, rtol=0.05)
    before = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    update = torch.cat([(weights(tmp_path / "1")[name] - before[name]).flatten() for name in before])
    other = torch.cat([(weights(tmp_path / "2")[name] - before[name]).flatten() for name in before])
    assert 0 < update.abs().max() < 1e-3
    assert torch.cosine_similarity(update, other, dim=0) > 0.9


@pytest.mark.slow
def test_a_full_disk_ends_all_processes_and_leaves_the_last_checkpoint(tiny_folder, tmp_path, alone):
    """No file may grow beyond 256 KiB, as on a full disk; without that limit the same command resumes."""
    out = tmp_path / "two"
    distill(tiny_folder, out, 2, "train.steps=2")
    limited = ["bash", "-c", 'ulimit -f 256; exec "$@"', "-", *command(tiny_folder, out, 2, "train.steps=4")]
    done = subprocess.run(
        limited, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "step_00000004: this checkpoint cannot be written" in done.stderr
    assert "earlier ones are unchanged" in done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir() if not path.name.startswith(".")] == ["step_00000002"]
    assert "resuming from step 2" in distill(tiny_folder, out, 2, "train.steps=4").stderr
    assert_close(weights(out), weights(alone))


@pytest.mark.slow
def test_four_processes_in_two_groups_resume_from_two(tiny_folder, tmp_path, alone):
    distill(tiny_folder, tmp_path / "run", 2, "train.steps=2")
    distill(tiny_folder, tmp_path / "run", 4, "train.steps=4", "train.fsdp_shard_size=2")
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone), atol=1e-5, rtol=1e-5)
    assert_close(weights(tmp_path / "run"), weights(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("method.terms.trajectory_mse={}",),
        ("method={name: trajectory}", "trajectory.teacher_steps_per_student_step=2", "optim.fake_score=null"),
        ("method.terms.mmd={}",),
        ("method.terms.gan={}", "optim.discriminator={lr: 1.0e-3}"),
        ("student.timestep_sampling=continuous",),
    ],
)
def test_terms_and_methods_equal_one_process(tiny_folder, tmp_path, more):
    """With real samples and trajectory caches, and with drawn levels."""
    sizes = ("trajectory.num_trajectories=4", "trajectory.guidance_scale=null", "train.steps=2")
    for processes in (1, 2):
        distill(tiny_folder, tmp_path / str(processes), processes, *sizes, *more)
    assert_close(weights(tmp_path / "2"), weights(tmp_path / "1"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_lora_adapters_on_two_processes(tiny_folder, tmp_path, dtype):
    more = ("models.train=lora", "models.rank=4", "train.steps=3", "optim.student={lr: 0.01, ema_decay: 0.5}")
    more += (f"models.frozen_dtype={dtype}",)
    for processes in (1, 2):
        distill(tiny_folder, tmp_path / str(processes), processes, *more)
    lora = [load_file(tmp_path / run / "lora" / "pytorch_lora_weights.safetensors") for run in ("1", "2")]
    # Adam divides the smallest gradients by themselves, and products of bf16 weights are rounded to bf16
    assert distance(*lora) < (1e-3 if dtype == "fp32" else 0.02)
    merged = [weights(tmp_path / run) for run in ("1", "2")]
    start = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert distance(*merged) < 0.1 * distance(merged[0], start)


@pytest.mark.slow
def test_full_copies_with_a_teacher_in_fp8_on_two_processes(tiny_folder, tmp_path):
    for processes in (1, 2):
        distill(tiny_folder, tmp_path / str(processes), processes, "models.frozen_dtype=fp8", "train.steps=2")
    assert distance(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-4


@pytest.mark.slow
def test_two_processes_share_a_cache_of_trajectories(tiny_folder, tmp_path):
    options = (f"teacher={tiny_folder}", "num_trajectories=6", "shard_size=2", "steps=2", "precision=fp32")
    for processes in (1, 2):
        words = [sys.executable, *launcher(processes), "-m", "fewstep", "cache-trajectories", "micro-cache"]
        words += ["--out", str(tmp_path / str(processes)), *(word for option in options for word in ("-s", option))]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == f"{tmp_path / str(processes)}\n"
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


@pytest.mark.slow
def test_one_killed_process_ends_all_and_the_run_resumes(tiny_folder, tmp_path):
    """One of two is killed in the middle: the other ends within seconds, and the run resumes from its checkpoint."""
    words = command(tiny_folder, tmp_path / "run", 2, "train.steps=100000")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for_checkpoint(process, tmp_path / "run")
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        start = time.monotonic()
        _, output = process.communicate(timeout=60)
        assert time.monotonic() - start < 45
        assert process.returncode != 0
        assert "SIGKILL" in output or "exitcode" in output
    finally:
        process.kill()
    reached = max(int(path.name[5:]) for path in (tmp_path / "run").glob("checkpoints/step_*"))
    again = distill(tiny_folder, tmp_path / "run", 2, f"train.steps={reached + 100_001}", "train.max_minutes=0.001")
    assert "resuming from step" in again.stderr


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_process(tiny_folder, tmp_path):
    """The restarted processes go on from the last checkpoint, to the weights of a run without a loss."""
    words = command(tiny_folder, tmp_path / "run", 2, "train.steps=20", restarts=1)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for_checkpoint(process, tmp_path / "run")
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[1]), signal.SIGKILL)
        _, output = process.communicate(timeout=180)
        assert process.returncode == 0, output
    finally:
        process.kill()
    assert "resuming from step" in output
    distill(tiny_folder, tmp_path / "whole", 2, "train.steps=20")
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_batches_are_divided_without_overlap(tiny):
    """Each process encodes and draws what its rows need, and together they have the batch of one process."""
    prompts = [f"prompt {i}" for i in range(20)]
    source = prompt_batches(tiny, prompts, size=6, seed=1)
    whole = source(3, DistContext().shard)
    parts = [source(3, DistContext(rank, 3).shard) for rank in range(3)]
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert torch.cat([part.prompts.lengths for part in parts]).tolist() == whole.prompts.lengths.tolist()
    assert [len(part) for part in parts] == [2, 2, 2]
    with pytest.raises(UserError, match="not a multiple of the 4 processes"):
        source(3, DistContext(0, 4).shard)
