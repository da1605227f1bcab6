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


def test_a_warm_up_that_does_not_end_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    trainable = Trainable("student", nn.Linear(2, 2), lambda batch: (batch.sum(), {}))
    train = TrainSettings(steps=5, batch_size=1)
    TrainState(trainable, OptimSettings(lr=0.1, warmup_steps=5), train)
    assert "warm" not in capsys.readouterr().err
    TrainState(trainable, OptimSettings(lr=0.1, warmup_steps=10), train)
    assert "optim.student.warmup_steps 10: longer than the training, whose last step has 50%" in capsys.readouterr().err


class Blocks(nn.Module):
    """A network with two matrices in numbered blocks; its other weights are AdamW's under muon."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedder = nn.Linear(32, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.embedder(batch)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return hidden


def muon_trainer(folder: Path, steps: int) -> Trainer:
    module, target = Blocks(), torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    method = Method()
    method.trainables = [Trainable("one", module, lambda batch: ((module(batch) - batch @ target).square().mean(), {}))]
    recipe = tiny_recipe(steps=steps, batch_size=8, save_every=5)
    data = lambda position, shard: torch.randn(64, 32, generator=torch.Generator().manual_seed(position))  # noqa: E731
    optim = {"one": OptimSettings(lr=0.01, optimizer="muon")}
    return Trainer(method, data, RunDir(folder, recipe), train=recipe.train, optim=optim)


def test_muon_makes_the_updates_of_block_matrices_orthogonal_and_as_large_as_adamws(tmp_path: Path) -> None:
    before = dict(muon_trainer(tmp_path / "start", 1).train_states[0].weights)
    state = fit(muon_trainer(tmp_path / "run", 1)).train_states[0]
    update = (state.weights["layers.0.weight"] - before["layers.0.weight"]).detach() / 0.01
    singular = torch.linalg.svdvals(update) / (0.2 * 32**0.5)  # 1 if orthogonal; Newton-Schulz leaves 0.5 to 1.5
    assert 0.5 < singular.median() < 1.5
    assert singular.max() < 1.5
    plain = (state.weights["embedder.weight"] - before["embedder.weight"]).detach() / 0.01
    assert plain.abs().median() == pytest.approx(1, abs=1e-3)  # AdamW's first update is the gradient's sign
    keys = {key.rpartition("/")[0]: key.rpartition("/")[2] for key in state.tensors()["optimizer"]}
    assert keys["layers.0.weight"] == "momentum_buffer"
    assert keys["layers.0.bias"] != "momentum_buffer"


def test_muon_resumes_exactly(tmp_path: Path) -> None:
    whole = fit(muon_trainer(tmp_path / "whole", 12))
    fit(muon_trainer(tmp_path / "parts", 7))
    assert_same(everything(fit(muon_trainer(tmp_path / "parts", 12))), everything(whole))


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
    constant = OptimSettings(lr=2.0)
    assert [learning_rate(constant, step, 5) for step in (1, 5, 50)] == [2, 2, 2]
