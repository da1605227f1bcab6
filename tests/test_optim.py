"""Optimizers and learning rates."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import assert_same, everything, fit, tiny_recipe
from torch import nn

from fewstep.config.sections import OptimSettings, TrainSettings
from fewstep.core.method import Method, Trainable
from fewstep.errors import UserError
from fewstep.training.optim import learning_rate
from fewstep.training.run_dir import RunDir
from fewstep.training.train_state import TrainState
from fewstep.training.trainer import Trainer


def test_adamw8bit_without_torchao_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)  # as if it were not installed
    trainable = Trainable("one", nn.Linear(2, 2), lambda batch: (batch.sum(), {}))
    with pytest.raises(UserError, match=r"needs torchao; pip install 'fewstep\[lowbit\]'"):
        TrainState(trainable, OptimSettings(lr=0.1, optimizer="adamw8bit"), TrainSettings(steps=1, batch_size=1))


@pytest.mark.slow  # compiles
def test_8_bit_adamw_follows_the_full_one_and_resumes_exactly(tmp_path: Path) -> None:
    """8-bit moments: nearly the same direction, and a resume is bit-exact."""
    pytest.importorskip("torchao", reason="fewstep[lowbit] is not installed")

    def trainer(folder: str, bits: int, steps: int) -> Trainer:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
        target = torch.randn(64, 64) / 8
        loss = lambda batch: ((module(batch) - batch @ target).square().mean(), {})  # noqa: E731
        method = Method()
        method.trainables = [Trainable("one", module, loss)]
        recipe = tiny_recipe(steps=steps, batch_size=32, save_every=5)
        run = RunDir(tmp_path / folder, recipe)
        data = lambda position, shard: torch.randn(32, 64, generator=torch.Generator().manual_seed(position))  # noqa: E731
        return Trainer(
            method,
            data,
            run,
            train=recipe.train,
            optim={"one": OptimSettings(lr=0.01, optimizer="adamw8bit" if bits == 8 else "adamw")},
        )

    full, whole = fit(trainer("full", 32, 20)), fit(trainer("whole", 8, 20))
    fit(trainer("parts", 8, 11))
    resumed = fit(trainer("parts", 8, 20))
    assert_same(everything(resumed), everything(whole))
    moments = whole.train_states[0].tensors()["optimizer"]
    assert moments["0.weight/exp_avg/codes"].dtype == torch.uint8
    start = trainer("start", 32, 1).train_states[0].weights["0.weight"]
    updates = [one.train_states[0].weights["0.weight"].detach() - start.detach() for one in (full, whole)]
    assert torch.cosine_similarity(updates[0].flatten(), updates[1].flatten(), dim=0) > 0.98


def test_learning_rate() -> None:
    cosine = OptimSettings(lr=1.0, warmup_steps=4, lr_schedule="cosine", min_lr_ratio=0.1)
    assert [learning_rate(cosine, step, 12) for step in (1, 2, 4, 8, 12)] == pytest.approx([0.25, 0.5, 1, 0.55, 0.1])
    linear = OptimSettings(lr=2.0, lr_schedule="linear")
    assert [learning_rate(linear, step, 5) for step in (1, 2, 3, 4, 5)] == pytest.approx([2, 1.5, 1, 0.5, 0])
    constant = OptimSettings(lr=2.0, min_lr_ratio=0.5)
    assert [learning_rate(constant, step, 5) for step in (1, 5, 50)] == [2, 2, 2]
