"""Alerts: when they are raised, their messages, and what the trainer does."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import fit, tiny_trainer

from fewstep.config.load import BUNDLED_RECIPES, load_recipe
from fewstep.config.recipe import Stage, StagesRecipe
from fewstep.core.method import UPDATE_METRICS
from fewstep.core.registry import load_plugins, methods
from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.alerts import AlertMonitor, AlertRule

load_plugins()  # registers the methods

HIGH = AlertRule("loss", "above", 1.0, 20, "too hot")


def alerts(rule: AlertRule, values: list[float]) -> list[str]:
    """The messages for these values at steps 10, 20, ..."""
    monitor = AlertMonitor([rule], 0)
    return [str(alert) for i, v in enumerate(values) if (alert := monitor.check(10 * (i + 1), {"loss": v}))]


def test_alert_is_raised_once_after_its_steps() -> None:
    assert alerts(HIGH, [2, 0.5, 2, 0.5]) == []
    assert alerts(HIGH, [0.5, 2, 2, 2, 2]) == ["loss is 2, above 1 since step 10: too hot"]


def test_relative_bound_is_a_multiple_of_the_first_value() -> None:
    relative = AlertRule("loss", "relative", 1.5, 10, "rising")
    assert alerts(relative, [4, 5, 5.9, 5.9]) == []
    assert alerts(relative, [4, 5, 6.1, 6.5]) == ["loss is 6.1, above 1.5 times its first value since step 20: rising"]


def test_metric_that_starts_late_counts_from_its_first_value() -> None:
    monitor = AlertMonitor([HIGH], 0)
    for step in range(10, 110, 10):
        assert monitor.check(step, {"other": 1.0}) is None
    raised = [monitor.check(step, {"loss": 2.0}) for step in range(110, 160, 10)]
    assert raised[0] is None
    assert [one.since for one in raised if one is not None] == [100]


def test_other_metrics_are_ignored() -> None:
    assert AlertMonitor([HIGH], 0).check(100, {"other": 9.0}) is None


def with_alert(directory: Path, action: str):  # type: ignore[no-untyped-def]
    """A training whose alert has its last good step at 6: `steps` counts up, and is above 6 from step 8 on."""
    trainer = tiny_trainer(directory, steps=20, log_every=2, save_every=3, max_checkpoints=9, on_alert=action)
    trainer.alert_rules = [AlertRule("steps", "above", 6.0, 4, "counts too far")]
    return trainer


def test_warn_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(with_alert(tmp_path, "warn")).step == 20
    assert "step 10: steps is 9.5, above 6 since step 6: counts too far" in capsys.readouterr().err


def test_stop_saves_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stopped at step 10 by an alert: steps is"):
        fit(with_alert(tmp_path, "stop"))
    assert checkpoint.load(checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1]).step == 10


def test_rollback_ends_at_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = fit(with_alert(tmp_path / "rolled-back", "rollback"))
    assert trainer.step == 6
    last = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "rolled-back" / "checkpoints")[-1])
    assert last.step == 6
    for state in trainer.train_states:
        for name, weight in state.weights.items():
            assert weight.equal(last.read(f"{state.name}.weights")[name]), name


def test_rollback_without_a_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, steps=20, log_every=2, save_every=9, on_alert="rollback")
    trainer.alert_rules = [AlertRule("steps", "above", 0.5, 2, "counts")]
    with pytest.raises(UserError, match="no checkpoint is left from before the alert"):
        fit(trainer)


def test_off_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(with_alert(tmp_path, "off"))
    assert "counts too far" not in capsys.readouterr().err
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 20


def test_a_rolled_back_run_stays_ended_when_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(with_alert(tmp_path, "rollback"))
    capsys.readouterr()
    assert fit(with_alert(tmp_path, "rollback")).step == 6
    assert "an alert ended it at step 6; -s train.on_alert=warn continues" in capsys.readouterr().err
    assert fit(with_alert(tmp_path, "warn")).step == 20


def metric_names_of(method: str) -> set[str]:
    """The metrics of all bundled recipes of a method, their fake scores and discriminators included."""
    found: set[str] = set()
    for file in sorted(BUNDLED_RECIPES.glob("*.yaml")):
        recipe = load_recipe(file)
        stages = recipe.stages if isinstance(recipe, StagesRecipe) else [recipe]
        for stage in stages:
            if isinstance(stage, Stage) and stage.method.name == method:
                found |= stage.method.metric_names(stage) or set()
                found |= {f"{part}/{name}" for part in stage.method.trainable_parts() for name in UPDATE_METRICS}
    return found


@pytest.mark.parametrize("name", methods.names())
def test_alert_rules_of_every_method_watch_metrics_that_exist(name: str) -> None:
    rules: Sequence[AlertRule] = methods.get(name).alert_rules
    assert {rule.metric for rule in rules} <= metric_names_of(name)
