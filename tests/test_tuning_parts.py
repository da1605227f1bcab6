"""Parts of a search: its clock, ranks and importances, and weights that trials share."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_trainer

from fewstep.models.adapters import add_adapter
from fewstep.models.pipeline import load
from fewstep.tuning.budget import Clock, seconds_per_step
from fewstep.tuning.objective import Objective
from fewstep.tuning.results import best_row, ranked
from fewstep.tuning.space import Range, Space
from fewstep.tuning.study import TrialRow, importances
from fewstep.tuning.workbench import sharing_weights


def test_time_that_others_compute_is_not_counted(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.method.pause = 0.05
    assert 0 < seconds_per_step(trainer, 12) < 0.04


def test_steps_of_each_quarter_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, timed = tiny_trainer(tmp_path), []
    plain = trainer.take_step

    def noted() -> dict[str, float]:
        timed.append(trainer.step)
        return plain()

    monkeypatch.setattr(trainer, "take_step", noted)
    seconds_per_step(trainer, 800)
    assert timed == [100, 101, 102, 300, 301, 302, 500, 501, 502, 700, 701, 702]


def test_a_stopped_clock() -> None:
    clock = Clock(limit=10, earlier=4)
    with clock.stopped():
        time.sleep(0.05)
    assert 4 <= clock.used < 4.04
    assert clock.left == pytest.approx(6, abs=0.05)


def test_adapters_on_shared_weights_leave_the_teacher_as_it_is(tiny_folder: Path) -> None:
    teacher = load(tiny_folder, "cpu")
    before = {name: tensor.clone() for name, tensor in teacher.transformer.state_dict().items()}
    shared = sharing_weights(teacher)
    add_adapter(shared.transformer, "student", 2, 2.0, target_modules=list(teacher.family.lora_target_modules))
    own = dict(shared.transformer.named_parameters())
    assert any("lora_A" in name for name in own)
    assert not any("lora" in name for name in teacher.transformer.state_dict())
    addresses = {tensor.data_ptr() for tensor in own.values()}
    assert all(tensor.data_ptr() in addresses for tensor in teacher.transformer.parameters())  # no second copy
    after = teacher.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def row(number: int, scores: list[float], lr: float = 1e-3, state: str = "stopped", size: int = 1) -> TrialRow:
    drawn = {"optim.student.lr": lr, "train.batch_size": size}
    return TrialRow(number, state, "", drawn, drawn, scores, 10, 10, 1.0, 1.0)


def test_trials_that_got_further_rank_first() -> None:
    rows = [row(0, [0.9]), row(1, [0.2, 0.5]), row(2, [0.3, 0.6]), row(3, []), row(4, [0.1, 0.99], state="failed")]
    assert [each.number for each in ranked(rows, Objective("x", "max"))] == [2, 1, 0]
    assert [each.number for each in ranked(rows, Objective("x", "min"))] == [1, 2, 0]
    assert best_row(rows[3:], Objective("x", "max")) is None


def test_the_key_that_matters_is_the_important_one() -> None:
    space = Space("here", {"optim.student.lr": Range(1e-4, 1e-1, log=True), "train.batch_size": Range(1, 8)})
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(40):
        lr = 10 ** (-4 + 3 * float(torch.rand((), generator=generator)))
        rows.append(row(number, [lr], lr, size=int(torch.randint(1, 9, (), generator=generator))))
    shares = importances(rows, space, Objective("x", "max"))
    assert shares["optim.student.lr"] > 0.6
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(rows[:3], space, Objective("x", "max")) == {}
