"""Alarms: when they go off, what they say, and what the trainer does about it."""

import json
from pathlib import Path

import pytest
from tiny import fit, tiny_trainer

from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.alerts import AlertMonitor, AlertRule

HIGH = AlertRule("loss", "above", 1.0, 20, "too hot")


def looks(alarm: AlertRule, values: list[float]) -> list[str]:
    """What is said at steps 10, 20, ... of these values."""
    dog = AlertMonitor([alarm], 0)
    return [str(raised) for i, v in enumerate(values) if (raised := dog.check(10 * (i + 1), {"loss": v}))]


def test_goes_off_once_after_long_enough() -> None:
    assert looks(HIGH, [2, 0.5, 2, 0.5]) == []
    assert looks(HIGH, [0.5, 2, 2, 2, 2]) == ["loss is 2, above 1 since step 10: too hot"]


def test_growth_is_measured_from_the_first_value() -> None:
    grows = AlertRule("loss", "grows", 1.5, 10, "rising")
    assert looks(grows, [4, 5, 5.9, 5.9]) == []
    assert looks(grows, [4, 5, 6.1, 6.5]) == ["loss is 6.1, above 1.5 times its first value since step 20: rising"]


def test_a_metric_that_comes_late_is_counted_from_there() -> None:
    watchdog = AlertMonitor([HIGH], 0)
    for step in range(10, 110, 10):
        assert watchdog.check(step, {"other": 1.0}) is None
    raised = [watchdog.check(step, {"loss": 2.0}) for step in range(110, 160, 10)]
    assert raised[0] is None
    assert [one.since for one in raised if one is not None] == [100]


def test_other_metrics_do_not_matter() -> None:
    assert AlertMonitor([HIGH], 0).check(100, {"other": 9.0}) is None


def always(directory: Path, action: str):  # type: ignore[no-untyped-def]
    """A training whose alarm has its last good step at 6: `steps` counts up, and is past 6 from step 8 on."""
    trainer = tiny_trainer(directory, steps=20, log_every=2, save_every=3, max_checkpoints=9, on_alert=action)
    trainer.alarms = [AlertRule("steps", "above", 6.0, 4, "counts too far")]
    return trainer


def test_warning_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(always(tmp_path, "warn")).step == 20
    assert "step 10: steps is 9.5, above 6 since step 6: counts too far" in capsys.readouterr().err


def test_stop_keeps_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stopped at step 10 by an alarm: steps is"):
        fit(always(tmp_path, "stop"))
    assert checkpoint.load(checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1]).step == 10


def test_rewind_ends_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = fit(always(tmp_path / "rewound", "rollback"))
    assert trainer.step == 6
    last = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "rewound" / "checkpoints")[-1])
    assert last.step == 6
    for learner in trainer.learners:
        for name, weight in learner.weights.items():
            assert weight.equal(last.read(f"{learner.name}.weights")[name]), name


def test_rewind_without_a_good_checkpoint_says_so(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=20, log_every=2, save_every=9, on_alert="rollback")
    trainer.alarms = [AlertRule("steps", "above", 0.5, 2, "counts")]
    with pytest.raises(UserError, match="no checkpoint is left from before the trouble"):
        fit(trainer)


def test_off_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(always(tmp_path, "off"))
    assert "counts too far" not in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 20
