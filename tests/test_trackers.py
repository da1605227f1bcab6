"""Weights & Biases and MLflow get a run's metrics and previews, offline; their failures do not end the training."""

import json
import sys
import time

import pytest
from mlflow import MlflowClient
from PIL import Image
from tiny import tiny_recipe

from fewstep.errors import UserError
from fewstep.training import trackers
from fewstep.training.run_dir import RunDir


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow puts images into ./mlruns
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def test_a_resumed_run_is_the_same_run_in_mlflow(offline):
    recipe = tiny_recipe(trackers=["mlflow"])
    for step in (1, 2):
        with RunDir(offline / "run", recipe) as run:
            run.track(step - 1)
            run.log(step, {"student/loss": 1.0 / step, "val/fd[pixels]": 3.0})
            run.preview(step, Image.new("RGB", (8, 8)))
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("fewstep").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.seed"] == str(recipe.train.seed)
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "student/loss")] == [
        (1, 1),
        (2, 0.5),
    ]
    assert found.data.metrics["val/fd_pixels_"] == 3.0
    assert len(client.list_artifacts(found.info.run_id, "images")) >= 2


def test_wandb_writes_an_offline_run_with_the_same_identifier_after_resuming(offline):
    recipe = tiny_recipe(trackers=["wandb"])
    for step in (1, 2):
        with RunDir(offline / "run", recipe) as run:
            run.track(step - 1)
            run.log(step, {"student/loss": 0.625})
    known = json.loads((offline / "run" / "trackers.json").read_text())["wandb"]
    files = list((offline / "run" / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(files) >= 1
    deadline = time.monotonic() + 30  # its service writes a little later
    while not all(b"student/loss" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_missing_library_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.trackers: wandb is not installed; pip install 'fewstep\[wandb\]'"):
        RunDir(tmp_path / "run", tiny_recipe(trackers=["wandb"]))
    assert not (tmp_path / "run").exists()


def test_a_server_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with (
        RunDir(tmp_path / "run", tiny_recipe(trackers=["mlflow"])) as run,
        pytest.raises(UserError, match=r"train\.trackers: mlflow did not start"),
    ):
        run.track(0)


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step, metrics):
        self.calls += 1
        raise ConnectionError("no route to the server\nand more")

    image = close = log


def test_a_failure_ends_the_tracker_and_not_the_training(capfd):
    failing = Failing()
    guarded = trackers.Guarded("mlflow", failing)
    guarded.log(1, {})
    guarded.log(2, {})
    assert failing.calls == 1
    assert "mlflow failed (no route to the server); the training continues without it" in capfd.readouterr().err
