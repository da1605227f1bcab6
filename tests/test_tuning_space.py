"""The search space, the objective and the budget of `fewstep tune`: files, checks and arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.config.load import load_recipe, parse_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.errors import UserError
from fewstep.tuning.budget import expected_trials, rung_shares, rung_steps, steps_within
from fewstep.tuning.objective import find_objective
from fewstep.tuning.results import short_names
from fewstep.tuning.space import Choices, Range, read_space

KNOWN = ["val/object_acc", "val/saturation", "val/fd_teacher[open-nsfw]"]


def space_of(tmp_path: Path, text: str):
    file = tmp_path / "space.yaml"
    file.write_text(text, encoding="utf-8")
    return read_space(file)


def test_a_file_with_every_form_of_a_key(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        "metric: object_acc\ndirection: max\n"
        "optim.student.lr: {low: 1.0e-4, high: 1.0e-3, log: true}\n"
        "train.batch_size: {low: 8, high: 32, step: 8}\n"
        "method.fake_score_updates: [1, 2, 5]\n"
        "optim.student.ema_decay: [null, 0.95]\n"
        "models: [{train: full}, {train: lora, rank: 16}]\n",
    )
    assert (space.metric, space.direction) == ("object_acc", "max")
    assert space.keys["optim.student.lr"] == Range(1e-4, 1e-3, log=True)
    assert space.keys["train.batch_size"].is_integer
    assert not space.keys["optim.student.lr"].is_integer
    recipe = load_recipe("micro-decoupled")
    space.check(recipe)
    # the recipe's own values, as an optimizer has them: a section by its label
    assert space.drawn(recipe) == {
        "optim.student.lr": 3e-4,
        "train.batch_size": 16,
        "method.fake_score_updates": 2,
        "optim.student.ema_decay": 0.95,
        "models": '{"train": "full"}',
    }
    values = space.values({"models": '{"train": "lora", "rank": 16}', "optim.student.lr": 2e-4})
    assert values == {"models": {"train": "lora", "rank": 16}, "optim.student.lr": 2e-4}


def test_values_outside_the_space_are_not_the_first_trial(tmp_path: Path) -> None:
    space = space_of(tmp_path, "train.batch_size: {low: 1, high: 32, step: 8}\noptim.student.lr: [1.0e-4, 2.0e-4]\n")
    assert space.drawn(load_recipe("micro-decoupled")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.studnt.lr: [1.0e-4, 2.0e-4]", "studnt"),
        ("optim.student.lr: {low: -1.0, high: 1.0}", "lr"),
        ("method.fake_score_updates: [1, 2.5]", "fake_score_updates"),
        ("method.terms.gan.weight: [0.1, 0.3]", "optim.discriminator is missing"),
        ("student.steps.more: [1, 2]", "steps holds a value"),
    ],
)
def test_keys_are_checked_against_the_recipe(tmp_path: Path, text: str, message: str) -> None:
    space = space_of(tmp_path, text)
    with pytest.raises(UserError, match=message) as raised:
        space.check(load_recipe("micro-decoupled"))
    assert str(raised.value).startswith(f"{space.source}: {text.partition(':')[0]}")
    assert "\n" not in str(raised.value)


def test_keys_that_fit_together_only(tmp_path: Path) -> None:
    """A rank alone has no effect on full copies; with models.train in the space before it, it is fine."""
    recipe = load_recipe("micro-decoupled")
    with pytest.raises(UserError, match="rank"):
        space_of(tmp_path, "models.rank: [8, 16]").check(recipe)
    space_of(tmp_path, "models.rank: [8, 16]").check(load_recipe("micro-decoupled", ["models.train=lora"]))


def test_choices_of_equal_value_but_other_type_are_different() -> None:
    assert Range(1, 5).contains(3)
    assert not Range(1, 5).contains(True)
    assert not Range(1, 9, step=2).contains(4)
    assert Choices({1: 1, 2: 2}).examples() == [1, 2]


def test_a_key_inside_a_choice_leaves_the_choice_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "method.terms:\n"
        "  - {cfg_augmentation: {guidance_scale: 3.0}, distribution_matching: {}}\n"
        "  - {cfg_augmentation: {guidance_scale: 3.0}, distribution_matching: {weight: 2.0}}\n"
        "method.terms.cfg_augmentation.guidance_scale: {low: 1.0, high: 5.0}\n"
    )
    space, recipe = read_space(tmp_path / "space.yaml"), load_recipe("micro-decoupled", [])
    assert isinstance(recipe, DistillRecipe)
    drawn = space.drawn(recipe)
    space.check(recipe)
    assert space.drawn(recipe) == drawn
    assert set(drawn) == set(space.keys)


def test_objective() -> None:
    assert find_objective("object_acc", None, KNOWN, "here").direction == "max"
    assert find_objective("val/object_acc", "min", KNOWN, "here").direction == "min"
    distance = find_objective("fd_teacher", None, KNOWN, "here")
    assert (distance.key, distance.direction) == ("val/fd_teacher[open-nsfw]", "min")
    assert distance.better(1.0, 2.0)
    with pytest.raises(UserError, match="whether more is better is not known"):
        find_objective("saturation", None, KNOWN, "here")
    with pytest.raises(UserError, match="there are object_acc, saturation"):
        find_objective("acc", None, KNOWN, "here")


def test_rungs() -> None:
    assert rung_shares(3) == pytest.approx([1 / 9, 1 / 3, 1])
    assert rung_steps(90, 3) == [10, 30, 90]
    assert rung_steps(100, 3) == [12, 34, 100]
    assert rung_steps(1, 3) == [1, 1, 1]
    assert rung_steps(7, 1) == [7]
    # 27 trials of 9 minutes: 27 x 1 + 9 x 2 + 3 x 6 minutes
    assert expected_trials(27 + 18 + 18, 9, 3) == 27
    assert expected_trials(30, 3, 1) == 10
    assert steps_within(0.5, 2.0) == 15
    assert steps_within(0.5, 100.0) == 1


def test_short_names_stay_apart() -> None:
    keys = ["optim.student.lr", "optim.fake_score.lr", "method.terms.a.weight", "method.terms.b.weight", "models"]
    assert list(short_names(keys).values()) == ["student.lr", "fake_score.lr", "a.weight", "b.weight", "models"]
    assert list(short_names(["stages.0.train.x", "stages.1.train.x"]).values()) == ["0.train.x", "1.train.x"]


def test_the_fixed_keys_exist() -> None:
    """A recipe key that is renamed must be renamed in the list of those that cannot be searched."""
    from fewstep.tuning.space import FIXED, _value_at

    tree = load_recipe("micro-decoupled").model_dump(mode="json")
    missing = [key for key in FIXED if _value_at(tree, key) is None and key != "train.max_minutes"]
    assert missing == []
    assert "max_minutes" in tree["train"]
    parse_recipe(tree, "again")
