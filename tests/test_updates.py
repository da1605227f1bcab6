"""Updates of trainables: accumulation, averages, skipped updates, clipping, start steps, precision."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny import TinyMethod, fit, tiny_trainer
from torch import nn

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.method import Trainable
from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.train_state import MAX_NONFINITE_SKIPS, TrainState


def test_accumulated_batches_equal_one_large_batch() -> None:
    torch.manual_seed(0)
    data, start = torch.randn(8, 3), nn.Linear(3, 1)
    updated = []
    for parts in (1, 4):
        module = copy.deepcopy(start)
        trainable = Trainable("one", module, lambda batch, module=module: (module(batch).square().mean(), {}))
        state = TrainState(trainable, OptimSettings(lr=0.1), TrainSettings(steps=9, batch_size=8))
        metrics = [state.update(data.chunk(parts), step) for step in range(1, 4)]
        updated.append((module.weight.detach(), torch.tensor([m["loss"] for m in metrics])))
    torch.testing.assert_close(updated[0], updated[1])
    assert not torch.equal(updated[0][0], start.weight)


def test_ema_follows_its_recurrence(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=3)
    state = trainer.train_states[0]
    average = state.weights["0.weight"].detach().clone()
    track: list[torch.Tensor] = []
    trainer.method.after_step = lambda step: track.append(state.weights["0.weight"].detach().clone()) or {}
    fit(trainer)
    for t, weight in enumerate(track):
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weight
    live = state.weights["0.weight"].detach().clone()
    with trainer.ema_weights():
        torch.testing.assert_close(state.weights["0.weight"].detach(), average)
        assert not torch.equal(state.weights["0.weight"], live)
    assert torch.equal(state.weights["0.weight"], live)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_update_is_skipped_and_counted(tmp_path: Path, where: str) -> None:
    trainer = tiny_trainer(tmp_path, steps=4)
    second = trainer.train_states[1]
    before = second.weights["weight"].detach().clone()

    def broken(batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = second.module(batch).sum()
        # the square root is finite at 0, its derivative is not
        return (total * float("nan") if where == "loss" else (total * 0).sqrt()), {}

    second.trainable.loss = broken
    fit(trainer)
    assert torch.equal(second.weights["weight"], before)
    assert second.counters == {"updates": 0, "nonfinite_skips": 8, "nonfinite_skips_in_a_row": 8}
    assert trainer.train_states[0].counters["updates"] == 4
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["second/nonfinite_skips"] == 1.0


def test_divergence_ends_with_an_error_that_suggests_settings(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=100)
    second = trainer.train_states[1]
    second.trainable.loss = lambda batch: (second.module(batch).sum() * float("inf"), {})
    with pytest.raises(UserError, match=r"second: 20 updates in a row.*lower optim.second.lr"):
        fit(trainer)
    assert second.counters["nonfinite_skips"] == MAX_NONFINITE_SKIPS
    assert len(checkpoint.list_checkpoints(trainer.run.checkpoints)) == 1  # of step 5: it is kept


def test_clipping_bounds_the_global_norm(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=1)
    second = trainer.train_states[1]
    norms: list[float] = []

    def spy(*_: object) -> None:
        gradients = [p.grad for p in second.module.parameters() if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    second.optimizer.register_step_pre_hook(spy)
    second.trainable.loss = lambda batch: (1000 * second.module(batch).sum(), {})
    fit(trainer)
    assert norms == pytest.approx([1.0, 1.0], rel=1e-4)


def test_gradients_are_cleared_after_each_update(tmp_path: Path) -> None:
    """A loss that reaches another trainable by mistake leaves no gradient for that one's optimizer."""
    trainer = tiny_trainer(tmp_path, steps=2)
    method = trainer.method
    assert isinstance(method, TinyMethod)
    first, second = trainer.train_states
    second.trainable.loss = lambda batch: ((second.module(batch) - method.first(batch)).square().mean(), {})
    fit(trainer)
    assert all(p.grad is None for p in first.module.parameters())


def test_start_step_delays_a_trainable(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", steps=3, log_every=1)
    trainer.train_states[0].trainable.start_step = 2
    start = [p.detach().clone() for p in trainer.train_states[0].module.parameters()]
    moved: list[bool] = []

    def check(step: int) -> dict[str, float]:
        pairs = zip(trainer.train_states[0].module.parameters(), start, strict=True)
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
    trainer.train_states[1].module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    fit(trainer)
    assert set(seen) == {torch.bfloat16}
    assert trainer.train_states[1].weights["weight"].dtype == torch.float32
