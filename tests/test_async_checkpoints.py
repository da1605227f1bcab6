"""Checkpoints that are written while the training continues."""

import threading

import pytest
import torch
from process_runs import assert_close, distill, weights
from tiny import assert_same, everything, fit, tiny_trainer

from fewstep.errors import UserError
from fewstep.training import checkpoint, checkpoint_writer
from fewstep.training.checkpoint_writer import CheckpointWriter
from fewstep.training.distributed import DistContext

BACKGROUND = {"async_checkpoints": True}


@pytest.fixture
def held(monkeypatch):
    """Writing waits for ``go``; ``begun`` is set when it begins."""
    go, begun, save = threading.Event(), threading.Event(), checkpoint.save

    def slow(*given):
        begun.set()
        assert go.wait(60)
        return save(*given)

    monkeypatch.setattr(checkpoint_writer.checkpoint, "save", slow)
    return go, begun


def test_what_changes_after_the_call_is_not_saved(tmp_path, held):
    go, begun = held
    live, state = torch.ones(3), {"means": {"loss": [1.0]}}
    writer = CheckpointWriter(DistContext(), background=True)
    writer.write(tmp_path, 5, {"one": {"w": live}}, state, keep=2)
    assert begun.wait(60)
    assert checkpoint.list_checkpoints(tmp_path) == []  # the caller was not held up
    live.zero_()
    state["means"]["loss"].append(2.0)
    go.set()
    writer.wait()
    found = checkpoint.load(tmp_path / "step_00000005")
    assert torch.equal(found.read("one")["w"], torch.ones(3))
    assert found.state == {"means": {"loss": [1.0]}}


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, held):
    go, _ = held
    writer = CheckpointWriter(DistContext(), background=True)
    writer.write(tmp_path, 1, {"one": {"w": torch.zeros(1)}}, {}, keep=1)
    threading.Timer(0.3, go.set).start()
    writer.write(tmp_path, 2, {"one": {"w": torch.ones(1)}}, {}, keep=1)
    writer.wait()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step_00000002"]


def test_a_training_is_the_same_and_resumes(tmp_path):
    whole = fit(tiny_trainer(tmp_path / "whole", save_every=1))
    first = tiny_trainer(tmp_path / "parts", save_every=2, **BACKGROUND)
    with first.run:
        first.fit(until=7)
    assert checkpoint.latest(tmp_path / "parts" / "checkpoints", print).step == 7
    resumed = fit(tiny_trainer(tmp_path / "parts", save_every=2, **BACKGROUND))
    assert_same(everything(whole), everything(resumed))


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path, monkeypatch):
    def full(*given):
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint_writer.checkpoint, "save", full)
    trainer = tiny_trainer(tmp_path, save_every=2, **BACKGROUND)
    with pytest.raises(UserError, match="the disk is full"):
        fit(trainer)
    assert trainer.step == 4  # the second checkpoint finds that the first one failed


def test_an_error_in_a_step_waits_for_the_checkpoint_before(tmp_path, monkeypatch, held):
    go, _ = held
    trainer = tiny_trainer(tmp_path, save_every=4, **BACKGROUND)

    def fail(step):
        if step == 5:
            threading.Timer(0.3, go.set).start()
            raise RuntimeError("an error in a step")
        return {}

    monkeypatch.setattr(trainer.method, "after_step", fail)
    with pytest.raises(RuntimeError, match="an error in a step"):
        fit(trainer)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["step_00000004"]


@pytest.mark.slow
def test_two_processes_write_beside_their_training(tiny_folder, tmp_path):
    """Every step saves; collectives of the thread and of the training have groups of their own."""
    more = ("train.save_every=1", "train.async_checkpoints=true")
    distill(tiny_folder, tmp_path / "alone", 1, "train.steps=4")
    distill(tiny_folder, tmp_path / "two", 2, "train.steps=3", *more)
    again = distill(tiny_folder, tmp_path / "two", 2, "train.steps=4", *more)
    assert "resuming from step 3" in again.stderr
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "alone"))
