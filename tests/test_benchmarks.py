"""Every benchmark imports what there is."""

import importlib
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

from fewstep.config.load import dump_recipe, load_recipe
from fewstep.tuning.space import read_space

TESTS = Path(__file__).parent
SCRIPTS = sorted((TESTS.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_benchmark_can_be_imported(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(script.parent)
    importlib.import_module(script.stem)


def study(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TESTS.parent / "benchmarks")
    return importlib.import_module(name)


def test_every_arm_and_cold_start_of_the_dmdr_study_is_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = study("dmdr_arms", monkeypatch)
    for name, changes in arms.COLD_STARTS.items():
        recipe = load_recipe("micro-turbo", [each.replace("STEPS", "100") for each in changes])
        assert (recipe.models.train == "lora") is (name in ("LoRA", "DynaDG"))
    for arm in arms.ARMS.values():
        recipe = load_recipe("micro-dmdr", [*arm.overrides, f"optim.student.lr={arm.lr}"])
        started = arm.cold_start in ("LoRA", "DynaDG")
        assert (recipe.models.train == "lora") is started  # an adapter starts from an adapter
        assert arm.cold_start is None or arm.cold_start in arms.COLD_STARTS


def test_targets_of_the_dmdr_study_are_counted_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    results = study("dmdr_results", monkeypatch)
    same = {"object_acc": 0.9, "style_acc": 0.9, "diversity": 0.02, "saturation": 0.40, "hf_energy": 0.4e-3}
    reference = {results.TEACHER: same | {"nearest_real_acc": 0.7}, results.REAL: same | {"nearest_real_acc": 1.0}}
    plain = same | {"nearest_real_acc": 0.72, "saturation": 0.36}
    joint = [plain | {"nearest_real_acc": 0.76, "saturation": 0.39}, plain | {"diversity": 0.01, "object_acc": 0.8}]
    lines = results.targets({results.DISTILLED: [plain, plain], "joint": joint}, reference).splitlines()
    assert lines[3] == "| joint | 1 of 2 | 1 of 2 | 2 of 2 | 1 of 2 | 1 of 2 | 0 of 2 |"
    alone = results.targets({"joint": joint}, reference).splitlines()
    assert alone[2] == "| joint | 1 of 2 | 1 of 2 | 2 of 2 | – | – | – |"


def test_every_arm_of_the_lora_study_is_a_recipe_and_its_subjects_have_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = study("lora_arms", monkeypatch)
    for arm in arms.ARMS.values():
        recipe = load_recipe(arm.recipe, list(arm.overrides))
        assert ("BASE_LORA" in str(recipe.method)) == (arm.base_share > 0)
    style, thing = (subject.prompts(30) for subject in arms.SUBJECTS.values())
    assert style[0] == style[1]
    assert all("fluent" in prompt for prompt in style[0])
    assert all("zorp" in prompt and "unicorn" not in prompt for prompt in thing[0])
    assert all("unicorn" in prompt for prompt in thing[1])


def test_every_arm_of_the_tuning_has_a_space_for_its_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tune, ablation = study("tune", monkeypatch), study("ablation", monkeypatch)
    assert set(tune.FULL) == set(ablation.VARIANTS)
    for arm, space in tune.ARMS.items():
        recipe, changes = ablation.VARIANTS[arm.removesuffix(", LoRA")]
        form = tune.LORA if arm.endswith("LoRA") else ()
        resolved = load_recipe(recipe, [*changes, *form, *ablation.cached(recipe, changes, tmp_path)])
        read_space(tune.SPACES / f"{space}.yaml").check(resolved)


def test_a_tuned_variant_has_the_steps_of_its_best_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ablation = study("ablation", monkeypatch)
    best = tmp_path / "CA-only" / "best.yaml"
    best.parent.mkdir()
    best.write_text(dump_recipe(load_recipe("micro-ca", ["train.steps=7"])))
    options = Namespace(tuned=tmp_path, length=10.0)
    assert ablation.settings("CA only", options) == (best, ["train.steps=70"])


def test_benchmarks_and_test_helpers_have_different_names() -> None:
    """Both folders are on the import path of a test run: of two modules with one name, the first one imported wins."""
    assert not {script.stem for script in SCRIPTS} & {module.stem for module in TESTS.glob("*.py")}
