"""`fewstep distill --ray` on a local Ray: two processes take the steps of one, also after one of them is killed."""

import os
import signal
import subprocess
import sys

import pytest
from process_runs import OPTIONS, assert_close, distill, wait_for_checkpoint, weights

from fewstep.errors import UserError
from fewstep.ray_train import _reason, _uses_gpus


def workers_of(parent):
    """Process ids of Ray Train's workers among the descendants of a process."""
    found, queue = [], [parent]
    while queue:
        listed = subprocess.run(["pgrep", "-P", str(queue.pop())], capture_output=True, text=True).stdout.split()
        queue += listed
        for pid in listed:
            name = subprocess.run(["ps", "-o", "args=", "-p", pid], capture_output=True, text=True).stdout
            found += [int(pid)] if "RayTrainWorker" in name else []
    return found


@pytest.mark.slow
def test_two_processes_go_on_after_a_killed_one(tiny_folder, tmp_path):
    pytest.importorskip("ray.train", reason="pip install 'fewstep[ray]'")
    settings = [word for option in (f"teacher={tiny_folder}", *OPTIONS, "train.steps=12") for word in ("-s", option)]
    words = ["-m", "fewstep", "distill", "micro-aligned", "--out", str(tmp_path / "ray"), "--ray", "2", *settings]
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for_checkpoint(process, tmp_path / "ray")
        workers = workers_of(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    assert "resuming from step" in output
    assert output.endswith(f"student: {tmp_path / 'ray' / 'student'}\n")
    distill(tiny_folder, tmp_path / "one", 1, "train.steps=12")
    assert_close(weights(tmp_path / "ray"), weights(tmp_path / "one"))


def test_too_small_clusters_are_refused():
    assert _uses_gpus({"CPU": 4.0, "GPU": 2.0}, "auto", 2)
    assert not _uses_gpus({"CPU": 4.0}, "auto", 2)
    assert not _uses_gpus({"CPU": 4.0, "GPU": 1.0}, "cpu", 2)
    with pytest.raises(UserError, match="--ray 2: the cluster has 1 CPUs; each process needs one"):
        _uses_gpus({"CPU": 1.0}, "auto", 2)
    with pytest.raises(UserError, match="--ray 2: the cluster has 1 GPUs; take fewer processes, or --device cpu"):
        _uses_gpus({"CPU": 4.0, "GPU": 1.0}, "auto", 2)


def test_a_mistake_in_a_process_is_one_line():
    class Failed(Exception):
        worker_failures = {0: ConnectionError("lost"), 1: UserError("a.txt: no such file")}  # noqa: RUF012

    assert _reason(Failed()) == "a.txt: no such file"
    assert _reason(RuntimeError("many\nlines\n\n")) == "--ray: the processes failed 4 times: lines"
