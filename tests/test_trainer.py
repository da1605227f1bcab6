"""The training loop: resuming, skipping, clipping, averaging, collecting, stopping."""

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
from tiny import CollectingMethod, assert_same, everything, fit, tiny_trainer

from fewstep.config.sections import OptimSettings
from fewstep.core.method import Loss, Trainable
from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.train_state import TrainState
from fewstep.training.trainer import Trainer


def stop_after(trainer: Trainer, step: int) -> None:
    """Ctrl-C during step number `step`."""
    original = trainer.method.after_step

    def after_step(done: int) -> dict[str, float]:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(done)

    trainer.method.after_step = after_step


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = tiny_trainer(tmp_path / "whole")
    fit(whole)
    expected = everything(whole)

    first = tiny_trainer(tmp_path / "parts")
    stop_after(first, 7)
    with pytest.raises(KeyboardInterrupt, match=r"saved step 7/12; resume with: the same command"):
        fit(first)
    assert first.step == 7
    torch.manual_seed(99)  # as another process may, before it trains
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


def test_parts_in_one_process_are_the_whole_training(tmp_path: Path) -> None:
    """Each part ends with a checkpoint; the schedule is that of all steps."""
    whole = tiny_trainer(tmp_path / "whole", log_every=1)
    fit(whole)
    parts = tiny_trainer(tmp_path / "parts", log_every=1)
    with parts.run:
        for end in (5, 9, 20):
            parts.fit(until=end)
            assert parts.step == min(end, 12)
            newest = checkpoint.list_checkpoints(tmp_path / "parts" / "checkpoints")[-1]
            assert newest.name == f"step_{min(end, 12):08d}"
    assert_same(everything(parts), everything(whole))


def test_stop_in_the_last_step_is_obeyed(tmp_path: Path) -> None:
    """What follows the training, such as an evaluation, must not start."""
    trainer = tiny_trainer(tmp_path)
    stop_after(trainer, 12)
    with pytest.raises(KeyboardInterrupt, match="saved step 12/12"):
        fit(trainer)


def test_killed_run_repeats_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    """Steps after the last checkpoint are taken again, and logged once."""
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


def test_finished_run_is_loaded_and_takes_no_step(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path)
    fit(first)
    again = tiny_trainer(tmp_path)
    again.method.after_step = lambda step: pytest.fail("took a step")
    fit(again)
    assert_same(everything(again), everything(first))


def test_only_trainable_weights_are_saved_and_updated(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    frozen = trainer.train_states[0].module[3].bias.clone()
    fit(trainer)
    assert torch.equal(trainer.train_states[0].module[3].bias, frozen)
    saved = checkpoint.load(checkpoint.list_checkpoints(trainer.run.checkpoints)[-1]).read("first.weights")
    assert "3.bias" not in saved
    assert {"0.weight", "2.running_mean"} <= saved.keys()


def test_previews_use_averaged_weights_and_do_not_change_the_training(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path / "plain")
    fit(plain)
    expected = everything(plain)

    seen = tiny_trainer(tmp_path / "seen", sample_every=5)
    first = seen.train_states[0]
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


def test_validation_is_logged_and_does_not_change_the_training(tmp_path: Path) -> None:
    plain = tiny_trainer(tmp_path / "plain")
    fit(plain)
    seen = tiny_trainer(tmp_path / "seen")
    seen.validate, seen.validate_every = lambda: {"val/name": torch.randn(()).item()}, 5
    fit(seen)
    assert_same(everything(seen), everything(plain))
    lines = [json.loads(line) for line in (tmp_path / "seen" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/name" in line] == [5, 10, 12]


def test_max_minutes_ends_a_training_as_its_last_step_does(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=10_000, max_minutes=0.005)
    trainer.method.pause = 0.02
    fit(trainer)
    assert 0 < trainer.step < 1000
    assert checkpoint.load(checkpoint.list_checkpoints(trainer.run.checkpoints)[-1]).step == trainer.step
    again = fit(tiny_trainer(tmp_path, steps=10_000, max_minutes=0.005))
    assert again.step == trainer.step


def test_thread_clock_does_not_count_waiting(tmp_path: Path) -> None:
    reached = {}
    for clock in ("wall", "thread"):
        trainer = tiny_trainer(tmp_path / clock, steps=10, max_minutes=0.01, clock=clock)
        trainer.method.pause = 0.1
        reached[clock] = fit(trainer).step
    assert reached["wall"] < reached["thread"] == 10


def test_collected_batch_is_shared_within_a_step(tmp_path: Path) -> None:
    """Two accumulated batches a step are collected once each, for both trainables and both inner epochs."""
    method = CollectingMethod()
    trainer = tiny_trainer(tmp_path, method=method, steps=3, gradient_accumulation_steps=2)
    collected: list[int] = []
    used: dict[str, list[int]] = {"first": [], "second": []}
    original = method.collect

    def collect(batch: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        result = original(batch)
        collected.append(id(result))
        kept.append(result)
        return result

    kept: list[torch.Tensor] = []
    method.collect = collect  # type: ignore[method-assign]
    for part in method.trainables:

        def loss(batch: torch.Tensor, part: Trainable = part, inner: Loss = part.loss) -> object:
            used[part.name].append(id(batch))
            return inner(batch)

        part.loss = loss  # type: ignore[assignment]
    fit(trainer)
    assert trainer.position == len(collected) == 6
    assert used["first"] == collected
    steps = [collected[i : i + 2] for i in (0, 2, 4)]
    assert used["second"] == [each for pair in steps for each in pair * 2]


def test_trainables_without_collected_batches_use_new_ones(tmp_path: Path) -> None:
    method = CollectingMethod()
    method.trainables[1].uses_collected = False
    assert fit(tiny_trainer(tmp_path, method=method, steps=3)).position == 3 * (1 + 2)


def test_resume_is_bit_exact_for_a_method_with_state_that_collects(tmp_path: Path) -> None:
    whole = fit(tiny_trainer(tmp_path / "whole", method=CollectingMethod()))
    expected = everything(whole)
    first = tiny_trainer(tmp_path / "parts", method=CollectingMethod())
    stop_after(first, 7)
    with pytest.raises(KeyboardInterrupt):
        fit(first)
    torch.manual_seed(99)
    second = fit(tiny_trainer(tmp_path / "parts", method=CollectingMethod()))
    assert (second.step, second.position) == (12, 12)
    assert_same(everything(second), expected)
    assert expected["method.mean"].abs().max() > 0


def test_checkpoint_without_the_methods_state_is_refused(tmp_path: Path) -> None:
    fit(tiny_trainer(tmp_path, steps=5))
    with pytest.raises(UserError, match="step 5 is not of this method and model"):
        fit(tiny_trainer(tmp_path, method=CollectingMethod(), steps=8))


def test_changed_model_is_refused(tmp_path: Path) -> None:
    fit(tiny_trainer(tmp_path))
    trainer = tiny_trainer(tmp_path, steps=20)
    wider = Trainable("second", torch.nn.Linear(3, 5), trainer.train_states[1].trainable.loss)
    trainer.train_states[1] = TrainState(wider, OptimSettings(lr=0.1), trainer.train)
    with pytest.raises(UserError, match="step 12 is not of this method and model"):
        fit(trainer)


def test_save_minutes_adds_checkpoints(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=6, save_every=1000, save_minutes=1e-9, max_checkpoints=3)
    fit(trainer)
    assert [path.name[-1] for path in checkpoint.list_checkpoints(trainer.run.checkpoints)] == ["4", "5", "6"]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_signal_saves_a_checkpoint_and_resume_is_bit_exact(tmp_path: Path, number: signal.Signals) -> None:
    """A real process and signal: it saves, prints how to resume, exits with 130; resuming gives the same weights."""
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
    assert "resume with: the same command" in message
    assert "Traceback" not in message

    torch.set_num_threads(1)
    settings = {"steps": 40, "save_every": 1000, "log_every": 1}
    resumed = tiny_trainer(directory, **settings)
    fit(resumed)
    found = everything(resumed)
    whole = tiny_trainer(tmp_path / "whole", **settings)
    fit(whole)
    assert_same(found, everything(whole))
