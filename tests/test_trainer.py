"""The loop: resuming, skipping, clipping, averaging, stopping."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TinyMethod, assert_same, everything, fit, tiny_trainer
from torch import nn

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.method import Trainable
from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.train_state import MAX_SKIPPED, TrainState
from fewstep.training.trainer import Trainer


def stop_after(trainer: Trainer, step: int) -> None:
    """Ctrl-C during step number `step`."""
    original = trainer.method.after_step

    def after_step(done: int) -> dict[str, float]:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(done)

    trainer.method.after_step = after_step


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path / "whole")
    fit(whole)
    expected = everything(whole)

    first = tiny_trainer(tmp_path / "parts")
    stop_after(first, 7)
    with pytest.raises(KeyboardInterrupt, match=r"saved step 7/12; resume with: the same again"):
        fit(first)
    assert first.step == 7
    torch.manual_seed(99)  # whatever the next process does before it trains
    second = tiny_trainer(tmp_path / "parts")
    fit(second)

    assert (second.step, second.position) == (12, 36)
    assert_same(everything(second), expected)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for line in (*lines[0], *lines[1]):
        del line["seconds"]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [4, 8, 12]


def test_stop_in_the_last_step_is_heard(tmp_path: Path) -> None:
    """What comes after the training, an evaluation perhaps, must not start."""
    trainer = tiny_trainer(tmp_path)
    stop_after(trainer, 12)
    with pytest.raises(KeyboardInterrupt, match="saved step 12/12"):
        fit(trainer)


def test_killed_between_checkpoints(tmp_path: Path) -> None:
    """Steps after the last checkpoint are taken again, and their log lines are not there twice."""
    whole = tiny_trainer(tmp_path / "whole", log_every=1)
    fit(whole)
    expected = everything(whole)
    killed = tiny_trainer(tmp_path / "killed", log_every=1)

    def die(step: int) -> dict[str, float]:
        if step == 8:
            raise RuntimeError("power cut")
        return {}

    killed.method.after_step = die
    with pytest.raises(RuntimeError, match="power cut"):
        fit(killed)
    again = tiny_trainer(tmp_path / "killed", log_every=1)
    fit(again)
    assert_same(everything(again), expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_finished_run_is_loaded_not_trained(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path)
    fit(first)
    again = tiny_trainer(tmp_path)
    again.method.after_step = lambda step: pytest.fail("took a step")
    fit(again)
    assert_same(everything(again), everything(first))


def test_only_what_is_trainable_is_saved_and_moved(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    frozen = trainer.learners[0].module[3].bias.clone()
    fit(trainer)
    assert torch.equal(trainer.learners[0].module[3].bias, frozen)
    saved = checkpoint.load(checkpoint.list_checkpoints(trainer.run.checkpoints)[-1]).read("first.weights")
    assert "3.bias" not in saved
    assert {"0.weight", "2.running_mean"} <= saved.keys()


def test_previews_have_averaged_weights_and_leave_no_trace(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path / "plain")
    fit(plain)
    expected = everything(plain)

    seen = tiny_trainer(tmp_path / "seen", sample_every=5)
    first = seen.learners[0]
    shown: list[tuple[int, bool, bool]] = []

    def preview(step: int) -> Image.Image:
        torch.randn(3)
        live = first.ema.weights["0.weight"]
        shown.append((step, first.module.training, torch.equal(live, first.weights["0.weight"])))
        return Image.new("RGB", (4, 4))

    seen.preview = preview
    fit(seen)
    assert shown == [(5, False, False), (10, False, False), (12, False, False)]
    assert sorted(path.name for path in (tmp_path / "seen" / "previews").iterdir()) == [
        "step_000005.png",
        "step_000010.png",
        "step_000012.png",
    ]
    assert first.module.training
    assert_same(everything(seen), expected)


def test_watched_metrics_are_logged_and_leave_no_trace(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path / "plain")
    fit(plain)
    seen = tiny_trainer(tmp_path / "seen")
    seen.watch, seen.watch_every = lambda: {"quality/name": torch.randn(()).item()}, 5
    fit(seen)
    assert_same(everything(seen), everything(plain))
    lines = [json.loads(line) for line in (tmp_path / "seen" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "quality/name" in line] == [5, 10, 12]


@pytest.mark.parametrize(("mode", "best"), [("max", 6), ("min", 3)])
def test_best_checkpoint_is_kept_and_can_be_recalled(tmp_path: Path, mode: str, best: int) -> None:
    """The metric is best at step 6 (or 3), which the newest two, 11 and 12, would have pushed out."""
    values = dict(zip(range(1, 13), [5, 4, 1, 8, 5, 9, 9, 2, 3, 4, 5, 6], strict=True))
    settings = {"save_every": 1, "max_checkpoints": 2, "keep_best": {"metric": "quality/name", "mode": mode}}

    def trainer(steps: int) -> Trainer:
        made = tiny_trainer(tmp_path, steps=steps, **settings)
        made.watch, made.watch_every = lambda: {"quality/name": float(values[made.step])}, 1
        return made

    fit(trainer(7))
    ended = fit(trainer(12))  # the best so far is remembered by the checkpoint
    kept = [int(path.name[5:]) for path in checkpoint.list_checkpoints(ended.run.checkpoints)]
    assert kept == [best, 11, 12]
    assert ended.best == [best, values[best]] or ended.best == (best, values[best])
    expected = checkpoint.load(checkpoint.list_checkpoints(ended.run.checkpoints)[0]).read("first.ema")
    assert ended.load_best()
    assert ended.step == best
    with ended.ema_weights():
        for name, weight in ended.learners[0].weights.items():
            assert weight.equal(expected[name])


def test_nothing_is_recalled_where_the_last_is_best(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, keep_best={"metric": "steps"})  # counts up
    fit(trainer)
    assert trainer.best is not None
    assert not trainer.load_best()


def test_time_ends_a_training_as_its_last_step_does(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=10_000, max_minutes=0.005)
    trainer.method.pause = 0.02
    fit(trainer)
    assert 0 < trainer.step < 1000
    assert checkpoint.load(checkpoint.list_checkpoints(trainer.run.checkpoints)[-1]).step == trainer.step
    again = fit(tiny_trainer(tmp_path, steps=10_000, max_minutes=0.005))
    assert again.step == trainer.step


def test_accumulated_batches_are_one_large_batch() -> None:
    torch.manual_seed(0)
    data, start = torch.randn(8, 3), nn.Linear(3, 1)
    moved = []
    for parts in (1, 4):
        module = copy.deepcopy(start)
        trainable = Trainable("one", module, lambda batch, module=module: (module(batch).square().mean(), {}))
        learner = TrainState(trainable, OptimSettings(lr=0.1), TrainSettings(steps=9, batch_size=8))
        metrics = [learner.update(data.chunk(parts), step) for step in range(1, 4)]
        moved.append((module.weight.detach(), torch.tensor([m["loss"] for m in metrics])))
    torch.testing.assert_close(moved[0], moved[1])
    assert not torch.equal(moved[0][0], start.weight)


def test_average_is_the_recurrence(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=3)
    learner = trainer.learners[0]
    average = learner.weights["0.weight"].detach().clone()
    track: list[torch.Tensor] = []
    trainer.method.after_step = lambda step: track.append(learner.weights["0.weight"].detach().clone()) or {}
    fit(trainer)
    for t, weight in enumerate(track):
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weight
    live = learner.weights["0.weight"].detach().clone()
    with trainer.ema_weights():
        torch.testing.assert_close(learner.weights["0.weight"].detach(), average)
        assert not torch.equal(learner.weights["0.weight"], live)
    assert torch.equal(learner.weights["0.weight"], live)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_update_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, where: str) -> None:
    trainer = tiny_trainer(tmp_path, steps=4)
    second = trainer.learners[1]
    before = second.weights["weight"].detach().clone()

    def broken(batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = second.module(batch).sum()
        # The square root's value at 0 is finite, its slope is not.
        return (total * float("nan") if where == "loss" else (total * 0).sqrt()), {}

    second.trainable.loss = broken
    fit(trainer)
    assert torch.equal(second.weights["weight"], before)
    assert second.counters == {"updates": 0, "skipped": 8, "skipped_in_a_row": 8}
    assert trainer.learners[0].counters["updates"] == 4
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["second/skipped"] == 1.0


def test_divergence_ends_with_advice(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=100)
    second = trainer.learners[1]
    second.trainable.loss = lambda batch: (second.module(batch).sum() * float("inf"), {})
    with pytest.raises(UserError, match=r"second: 20 updates in a row.*lower learning rate"):
        fit(trainer)
    assert second.counters["skipped"] == MAX_SKIPPED
    assert len(checkpoint.list_checkpoints(trainer.run.checkpoints)) == 1  # of step 5: what was written stays


def test_clipping_bounds_the_global_norm(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=1)
    second = trainer.learners[1]
    norms: list[float] = []

    def spy(*_: object) -> None:
        gradients = [p.grad for p in second.module.parameters() if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    second.optimizer.register_step_pre_hook(spy)
    second.trainable.loss = lambda batch: (1000 * second.module(batch).sum(), {})
    fit(trainer)
    assert norms == pytest.approx([1.0, 1.0], rel=1e-4)


def test_a_players_gradient_does_not_outlive_its_update(tmp_path: Path) -> None:
    """A loss that reaches another trainable by mistake leaves no gradient for that one's optimizer."""
    trainer = tiny_trainer(tmp_path, steps=2)
    method = trainer.method
    assert isinstance(method, TinyMethod)
    first, second = trainer.learners
    second.trainable.loss = lambda batch: ((second.module(batch) - method.first(batch)).square().mean(), {})
    fit(trainer)
    assert all(p.grad is None for p in first.module.parameters())


def test_a_player_that_waits_lets_the_others_go_first(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", steps=3, log_every=1)
    trainer.learners[0].trainable.start_step = 2
    start = [p.detach().clone() for p in trainer.learners[0].module.parameters()]
    moved: list[bool] = []

    def check(step: int) -> dict[str, float]:
        pairs = zip(trainer.learners[0].module.parameters(), start, strict=True)
        moved.append(any(not torch.equal(now, then) for now, then in pairs))
        return {}

    trainer.method.after_step = check  # type: ignore[method-assign]
    trainer.fit()
    assert moved == [False, False, True]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["first/loss" in line for line in lines] == [False, False, True]
    assert all("second/loss" in line for line in lines)


def test_bf16_keeps_master_weights(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=2, precision="bf16")
    seen: list[torch.dtype] = []
    trainer.learners[1].module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    fit(trainer)
    assert set(seen) == {torch.bfloat16}
    assert trainer.learners[1].weights["weight"].dtype == torch.float32


def test_changed_model_is_refused(tmp_path: Path) -> None:
    fit(tiny_trainer(tmp_path))
    trainer = tiny_trainer(tmp_path, steps=20)
    wider = Trainable("second", torch.nn.Linear(3, 5), trainer.learners[1].trainable.loss)
    trainer.learners[1] = TrainState(wider, OptimSettings(lr=0.1), trainer.train)
    with pytest.raises(UserError, match="step 12 is not of this method and model"):
        fit(trainer)


def test_time_between_checkpoints(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=6, save_every=1000, save_minutes=1e-9, max_checkpoints=3)
    fit(trainer)
    assert [path.name[-1] for path in checkpoint.list_checkpoints(trainer.run.checkpoints)] == ["4", "5", "6"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_from_outside_then_gone_on_with(tmp_path: Path, number: signal.Signals) -> None:
    """A real process, a real signal: it saves, says how to go on, exits with 130; going on gives the same weights."""
    directory = tmp_path / "stopped"
    script = [sys.executable, str(Path(__file__).parent / "tiny.py"), str(directory), "40"]
    process = subprocess.Popen([*script, "0.1"], stderr=subprocess.PIPE, text=True)
    metrics = directory / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "resume with: the same again" in message
    assert "Traceback" not in message

    torch.set_num_threads(1)
    settings = {"steps": 40, "save_every": 1000, "log_every": 1}
    resumed = tiny_trainer(directory, **settings)
    fit(resumed)
    found = everything(resumed)
    whole = tiny_trainer(tmp_path / "whole", **settings)
    fit(whole)
    assert_same(found, everything(whole))
