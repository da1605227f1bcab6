"""The watch for reward hacking: what is measured, when the alarm fires, which checkpoint is the best, the plot."""

import json
from pathlib import Path

import pytest
from tiny import fit, tiny_trainer
from watch_setup import WATCH_FEATURES, WATCHED

from fewstep import api
from fewstep.config.sections import BestSettings, WatchSettings
from fewstep.errors import UserError
from fewstep.evaluation.plots import relative_curves
from fewstep.evaluation.validation import Validator, validation_metrics
from fewstep.evaluation.watch import REWARD, hacking_rules
from fewstep.training.alerts import AlertMonitor, DivergenceRule
from fewstep.training.best import new_best

RULE = DivergenceRule("reward", "other", 0.95, 20, "hacked")


def alerts(lines, rule=RULE):
    monitor = AlertMonitor([rule], 0)
    return [str(found) for i, line in enumerate(lines) if (found := monitor.check(10 * i, line))]


def line(reward, other):
    return {"reward": reward, "other": other}


# --- the alarm ----------------------------------------------------------------------------------------------------


def test_the_alarm_needs_a_rise_a_fall_and_a_span():
    start = line(1.0, 0.8)
    hacked = line(1.5, 0.7)
    assert alerts([start, *[line(1.5, 0.79)] * 9]) == []  # within 5%
    assert alerts([start, *[line(0.9, 0.5)] * 9]) == []  # both fall: no hacking
    assert alerts([start, hacked, start, hacked, start]) == []  # not for 20 steps
    assert alerts([start, *[hacked] * 9]) == [
        "reward rose from 1 to 1.5 while other fell from 0.8 to 0.7, since step 0: hacked"
    ]


def test_lines_without_validation_do_not_end_the_span():
    plain = {"student/loss": 1.0}
    hacked = line(1.5, 0.7)
    assert len(alerts([line(1.0, 0.8), hacked, plain, plain, hacked])) == 1


def test_the_start_is_remembered_over_a_resume(tmp_path):
    """The alarm of the resumed run compares with the first run's start, not with its own."""
    values = {0: (1.0, 0.8), **dict.fromkeys(range(1, 13), (1.5, 0.7))}

    def trainer(steps):
        made = tiny_trainer(tmp_path, steps=steps, save_every=1, on_alert="stop")
        made.validate = lambda: line(*values[made.step])
        made.validate_every, made.validate_first = 1, True
        made.alert_rules = [DivergenceRule("reward", "other", 0.95, 6, "hacked")]
        return made

    first = fit(trainer(3))
    assert first.first["reward"] == 1.0
    with pytest.raises(UserError, match=r"stopped at step 9 by an alert: reward rose from 1 to 1.5"):
        fit(trainer(12))
    logged = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (logged[0]["step"], logged[0]["reward"]) == (0, 1.0)
    assert [each["step"] for each in logged] == list(range(10))


def test_rules_compare_the_reward_with_every_measure_that_is_not_trained_on():
    found = hacking_rules(["val/object_acc"], WatchSettings(share=0.9, steps=7), fixed=True)
    assert [(rule.rising, rule.falling, rule.share, rule.steps) for rule in found] == [
        ("val/reward", "val/object_acc", 0.9, 7),
        ("val/reward", "val/diversity", 0.9, 7),
    ]


def test_a_measure_that_falls_is_an_alarm_of_its_own_where_a_discriminator_is_the_reward():
    rules = hacking_rules(["other"], WatchSettings(share=0.95, steps=20), fixed=False)
    monitor = AlertMonitor(rules, step=0)
    values = [0.8, 0.7, 0.79, 0.7, 0.7, 0.7]  # below 0.76 from step 30 on
    alerts = [monitor.check(10 * i, {"other": value, "val/diversity": 1.0}) for i, value in enumerate(values)]
    assert [alert is not None for alert in alerts] == [False] * 4 + [True, False]
    assert "other is 0.7, below 0.95 times its first value since step 20" in str(alerts[4])


# --- the best checkpoint ------------------------------------------------------------------------------------------


def test_the_best_checkpoint_has_the_highest_reward_whose_guards_held():
    settings = BestSettings(metric="reward", at_least={"other": 0.95})
    first, best = line(1.0, 0.8), None
    for step, found in enumerate([line(1.1, 0.8), line(1.3, 0.77), line(1.9, 0.5), {"reward": 2.0}, line(1.2, 0.9)]):
        best = new_best(best, settings, step, found, first) or best
    assert (best.step, best.value) == (1, 1.3)


def test_a_guard_that_is_no_metric_is_refused():
    for metric, message in (
        ("val/objectacc", "never measured; set evaluate.validate_every"),
        ("student/los", "no 'student/los'"),
    ):
        overrides = [
            "evaluate.validate_every=0",
            f"train.keep_best={{metric: student/loss, at_least: {{{metric}: 0.9}}}}",
        ]
        with pytest.raises(UserError, match=message):
            api.load_recipe("micro-aligned", overrides)


# --- what is measured ---------------------------------------------------------------------------------------------

PROMPTS = [f"a noto emoji of a red apple on a {color} background" for color in ("blue", "white", "pink")]


def test_the_watch_measures_rewards_diversity_and_distance(tiny):
    settings = WatchSettings(diversity_prompts=2, diversity_seeds=2, teacher_steps=2)
    validator = Validator(PROMPTS, ["emoji"], WATCHED, WATCH_FEATURES, settings)
    validate = validator(tiny, tiny)
    found = validate()
    assert set(found) == set(validation_metrics(PROMPTS, ["emoji"], WATCHED, WATCH_FEATURES))
    assert found[REWARD] == pytest.approx(2 * found["val/reward_test_dark"] - found["val/reward_test_light"])
    assert found["val/diversity"] > 0
    assert found["val/fd_teacher[test_pixels]"] > 0  # its own images at other steps and guidance
    assert validate() == found
    watched = {rule.falling for rule in validator.alert_rules()}
    assert watched == {"val/object_acc", "val/style_acc", "val/background_acc", "val/diversity"}


def test_what_is_trained_on_does_not_measure_the_result():
    with pytest.raises(UserError, match=r"evaluate\.scorers: emoji is trained on, which a scorer must not be"):
        Validator(PROMPTS, ["emoji"], {"emoji": 1.0})


def test_with_a_discriminator_as_the_reward_the_same_is_measured_but_no_reward(tiny):
    settings = WatchSettings(diversity_prompts=2, diversity_seeds=2, teacher_steps=2)
    validator = Validator(PROMPTS, ["emoji"], {}, WATCH_FEATURES, settings)
    found = validator(tiny, tiny)()
    assert validator.watches
    assert set(found) == set(validation_metrics(PROMPTS, ["emoji"], {}, WATCH_FEATURES))
    assert REWARD not in found
    assert {"val/diversity", "val/fd_teacher[test_pixels]"} <= set(found)
    recipe = api.load_recipe("micro-advdmd-4")
    assert recipe.method.trained_rewards() == {}
    assert api.load_recipe("micro-turbo").method.trained_rewards() is None


def test_without_rewards_nothing_is_watched():
    validator = Validator(PROMPTS, ["emoji"])
    assert not validator.watches
    assert validator.alert_rules() == []


# --- the plot -----------------------------------------------------------------------------------------------------


def test_the_report_draws_all_on_one_axis():
    lines = [{"step": step, "val/reward": 1.0 + step, "val/other": 2.0, "val/empty": 0.0} for step in (0, 10)]
    drawn = relative_curves(lines, "val/reward")
    assert drawn is not None
    assert drawn.count("<svg") == 1
    assert all(f">{name}<" in drawn for name in ("reward", "other"))
    assert ">empty<" not in drawn
    assert relative_curves(lines[:1], "val/reward") is None
    assert relative_curves([{"step": 0, "val/other": 1.0}] * 2, "val/reward") is None


def test_the_template_has_a_place_for_it() -> None:
    page = Path(api.__file__).parent / "evaluation" / "report.html"
    assert "{{ watch|safe }}" in page.read_text(encoding="utf-8")
