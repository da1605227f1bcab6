"""Recipes: bundled ones are valid, mistakes are one line."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from fewstep.config.load import BUNDLED_RECIPES, dump_recipe, load_recipe, recipe_model
from fewstep.config.recipe import DistillRecipe
from fewstep.core.registry import load_plugins, recipe_kinds
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.errors import UserError

load_plugins()

CLASSIFIER = """\
kind: classifier
name: tiny
train: {steps: 10, batch_size: 4}
optim:
  lr: 1e-3
"""

DISTILL = """\
kind: distill
name: tiny
teacher: micro
method: {name: dmd, terms: {cfg_augmentation: {}, distribution_matching: {}}}
optim: {student: {lr: 1.0e-4}, fake_score: {lr: 2.0e-4}}
train: {steps: 10, batch_size: 4}
"""


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CLASSIFIER, encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load_recipe(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("path", sorted(BUNDLED_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path).kind in recipe_kinds
    assert load_recipe(f"recipes/{path.name}") == load_recipe(path) == load_recipe(path.stem)


def test_a_file_takes_precedence_over_a_bundled_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "classifier.yaml").write_text(CLASSIFIER.replace("tiny", "mine"))
    assert load_recipe("recipes/classifier.yaml").name == "mine"


def test_values_and_defaults(classifier: Path) -> None:
    recipe = load_recipe(classifier)
    assert isinstance(recipe, ClassifierRecipe)
    assert recipe.optim.lr == 0.001  # YAML itself reads 1e-3, without a point, as a text
    assert recipe.optim.betas == (0.9, 0.999)
    assert (recipe.train.steps, recipe.train.seed, recipe.train.precision) == (10, 0, "fp32")


def test_saved_recipe_reads_back(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(DISTILL)
    recipe = load_recipe(
        tmp_path / "one.yaml", ["student.steps=2", "student.timesteps=[1, 0.5]", "optim.fake_score.lr=1e-5"]
    )
    (tmp_path / "two.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "two.yaml") == recipe
    assert isinstance(recipe, DistillRecipe)
    assert recipe.optim["fake_score"].lr == 1e-5


def test_overrides(classifier: Path) -> None:
    recipe = load_recipe(
        classifier,
        ["train.steps=99", "optim.betas=[0.5, 0.9]", "optim.ema_decay=null", "name=other", "data.num_objects=3"],
    )
    assert (recipe.train.steps, recipe.name, recipe.data.num_objects) == (99, "other", 3)
    assert (recipe.optim.betas, recipe.optim.ema_decay) == ((0.5, 0.9), None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", "unknown key train.stpes; did you mean train.steps?"),
        ("steps=5", "unknown key steps; did you mean train.steps?"),
        ("optm.lr=5", "unknown key optm; did you mean optim?"),
        ("train.zzzz=5", "unknown key train.zzzz; known keys: train.steps, "),
        ("train.steps=many", "train.steps: input should be a valid integer"),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1 (got 0)"),
        ("optim.lr=.nan", "optim.lr: input should be a finite number"),
        ("train.precision=fp16", "train.precision: input should be 'fp32', 'bf16' or 'auto' (got 'fp16')"),
        ("name=../elsewhere", "name: string should match pattern"),
        ("train.steps", "expected key=value"),
        ("=5", "expected key=value"),
        ("train.steps=[1", "the value is not valid YAML"),
        ("name.first=5", "name holds a value, not further keys"),
        (
            "kind=classifiers",
            "kind is 'classifiers'; a recipe's kind is one of cache_trajectories, classifier, decoder, distill",
        ),
        ("kind=judge", "kind is 'judge', which is now classifier"),
    ],
)
def test_wrong_override_is_one_line(classifier: Path, override: str, message: str) -> None:
    assert message in refusal(classifier, override)


def test_a_bare_off_is_a_value(classifier: Path) -> None:
    """YAML reads it as false."""
    assert load_recipe(str(classifier), ["train.on_alert=off"]).train.on_alert == "off"


def test_misspelled_required_key_is_named_before_the_missing_one(classifier: Path) -> None:
    classifier.write_text(CLASSIFIER.replace("lr:", "learning_rate:"))
    message = refusal(classifier)
    assert str(classifier) in message
    assert "unknown key optim.learning_rate" in message
    assert "and 1 more mistake" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("name: x\n", "it has no kind"),
        ("kind: [classifier]\n", "kind is ['classifier']"),
        ("kind: classifier\n  name: x\n", "not valid YAML"),
        (CLASSIFIER.replace("steps: 10, ", ""), "train.steps is missing"),
        (CLASSIFIER.replace("name: tiny", "name: tiny\nname: again"), "the key name is given twice"),
        (CLASSIFIER + "? {a: 1}\n: 2\n", "not valid YAML"),
        (CLASSIFIER + "loop: &loop [*loop]\n", "unknown key loop"),
    ],
)
def test_wrong_file_is_one_line_with_its_name(classifier: Path, text: str, message: str) -> None:
    classifier.write_text(text)
    assert refusal(classifier).startswith(f"{classifier}: ")
    assert message in refusal(classifier)


def test_a_missing_file_lists_the_bundled_recipes(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing.yaml")
    assert "no such recipe file" in message
    assert "micro-turbo" in message


def test_a_binary_file_is_refused(classifier: Path) -> None:
    classifier.write_bytes(b"\xff\xfe\x00kind")
    assert "not a UTF-8 text file" in refusal(classifier)


@pytest.fixture
def distill(tmp_path: Path) -> Path:
    path = tmp_path / "distill.yaml"
    path.write_text(DISTILL, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spear.alpha=4", "unknown key spear, which is now method.terms.cfg_augmentation"),
        ("fake_updates=2", "unknown key fake_updates, which is now method.fake_score_updates"),
        ("roles.kind=lora", "unknown key roles, which is now models"),
        ("student.anchors=[1]", "unknown key student.anchors, which is now student.timesteps"),
        ("train.accumulate=2", "unknown key train.accumulate, which is now train.gradient_accumulation_steps"),
        ("optim.student.ema=0.9", "unknown key optim.student.ema, which is now optim.student.ema_decay"),
        ("method.name=dmdd", "method.name: input should be 'dmd', 'trajectory' (got 'dmdd')"),
        ("method={terms: {}}", "method.name is missing"),
        ("method={name: trajectory, terms: {}}", "unknown key method.terms"),
        ("method.terms.cfg_augmentaton={}", "did you mean method.terms.cfg_augmentation?"),
        ("method.terms.cfg_augmentation.weight=-1", "method.terms.cfg_augmentation.weight: input should be greater"),
        ("method.terms.cfg_augmentation.weight=big", "method.terms.cfg_augmentation.weight: expected a number"),
        ("method.dmd_norm_eps=0", "method.dmd_norm_eps: input should be greater than 0 (got 0)"),
        ("optim.teacher={lr: 1}", "optim.teacher: method dmd has no such trainable part"),
    ],
)
def test_mistakes_in_a_method_are_one_line(distill: Path, override: str, message: str) -> None:
    assert message in refusal(distill, override)


def test_a_term_set_to_null_is_off(distill: Path) -> None:
    recipe = load_recipe(distill, ["method.terms.distribution_matching=null", "optim.fake_score=null"])
    assert recipe.method.trainable_parts() == ["student"]
    assert recipe.method.extra_models() == []


def sections(annotation: object) -> set[type[BaseModel]]:
    found = set()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        found.add(annotation)
        for field in annotation.model_fields.values():
            found |= sections(field.annotation)
    for part in get_args(annotation):
        found |= sections(part)
    return found


@pytest.mark.parametrize("kind", recipe_kinds.names())
def test_every_field_is_described(kind: str) -> None:
    found = sections(recipe_model(kind))
    undescribed = [
        f"{model.__name__}.{name}"
        for model in found
        for name, field in model.model_fields.items()
        if not field.description and name not in ("kind", "name", "value")
    ]
    assert not undescribed
    assert all(model.model_config.get("extra") == "forbid" for model in found)
