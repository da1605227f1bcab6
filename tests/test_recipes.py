"""Recipes: what ships is valid, what is wrong is named in one line."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from fewstep.config.load import BUNDLED_RECIPES, dump_recipe, load_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.core.registry import load_plugins, recipe_kinds

load_plugins()
from fewstep.emoji.recipes import ClassifierRecipe
from fewstep.errors import UserError

JUDGE = """\
kind: judge
name: tiny
train: {steps: 10, batch_size: 4}
optim:
  lr: 1e-3
"""

DISTILL = """\
kind: distill
name: tiny
teacher: micro
optim: {student: {lr: 1.0e-4}, fake: {lr: 2.0e-4}}
train: {steps: 10, batch_size: 4}
"""


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    path = tmp_path / "judge-of-mine.yaml"
    path.write_text(JUDGE, encoding="utf-8")
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


def test_a_file_of_ones_own_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "judge.yaml").write_text(JUDGE.replace("tiny", "mine"))
    assert load_recipe("recipes/judge.yaml").name == "mine"


def test_values_and_defaults(judge: Path) -> None:
    recipe = load_recipe(judge)
    assert isinstance(recipe, ClassifierRecipe)
    assert recipe.optim.lr == 0.001  # YAML itself reads 1e-3, without a point, as a text
    assert recipe.optim.betas == (0.9, 0.999)
    assert (recipe.train.steps, recipe.train.seed, recipe.train.precision) == (10, 0, "fp32")


def test_saved_recipe_reads_back(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(DISTILL)
    recipe = load_recipe(tmp_path / "one.yaml", ["student.anchors=[1, 0.5]", "optim.fake.lr=1e-5"])
    (tmp_path / "two.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "two.yaml") == recipe
    assert isinstance(recipe, DistillRecipe)
    assert recipe.optim.fake.lr == 1e-5


def test_overrides(judge: Path) -> None:
    recipe = load_recipe(
        judge, ["train.steps=99", "optim.betas=[0.5, 0.9]", "optim.ema_decay=null", "name=other", "data.things=3"]
    )
    assert (recipe.train.steps, recipe.name, recipe.data.things) == (99, "other", 3)
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
        ("kind=judges", "kind is 'judges'; a recipe's kind is one of vae, text, flow, judge, distill"),
    ],
)
def test_wrong_override_is_one_line(judge: Path, override: str, message: str) -> None:
    assert message in refusal(judge, override)


def test_a_bare_off_is_a_word(judge: Path) -> None:
    """YAML has it for false."""
    assert load_recipe(str(judge), ["train.on_alert=off"]).train.on_alert == "off"


def test_misspelt_required_key_is_named_before_the_missing_one(judge: Path) -> None:
    judge.write_text(JUDGE.replace("lr:", "learning_rate:"))
    message = refusal(judge)
    assert str(judge) in message
    assert "unknown key optim.learning_rate" in message
    assert "and 1 more mistake" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe is a mapping"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("name: x\n", "it has no kind"),
        ("kind: [judge]\n", "kind is ['judge']"),
        ("kind: judge\n  name: x\n", "not valid YAML"),
        (JUDGE.replace("steps: 10, ", ""), "train.steps is missing"),
        (JUDGE.replace("name: tiny", "name: tiny\nname: again"), "the key name is given twice"),
        (JUDGE + "? {a: 1}\n: 2\n", "not valid YAML"),
        (JUDGE + "loop: &loop [*loop]\n", "unknown key loop"),
    ],
)
def test_wrong_file_is_one_line_with_its_name(judge: Path, text: str, message: str) -> None:
    judge.write_text(text)
    assert refusal(judge).startswith(f"{judge}: ")
    assert message in refusal(judge)


def test_missing_file_names_what_there_is(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nothing.yaml")
    assert "no such recipe file" in message
    assert "judge" in message


def test_file_that_is_no_text(judge: Path) -> None:
    judge.write_bytes(b"\xff\xfe\x00kind")
    assert "not a UTF-8 text file" in refusal(judge)


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= models(field.annotation)
    return found


@pytest.mark.parametrize("kind", recipe_kinds.names())
def test_every_field_is_described(kind: str) -> None:
    undescribed = [
        f"{model.__name__}.{name}"
        for model in models(recipe_kinds.get(kind))
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not undescribed
    assert all(model.model_config.get("extra") == "forbid" for model in models(recipe_kinds.get(kind)))
