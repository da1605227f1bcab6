"""An evaluation uses the user's own test prompts; its cost is stated before the work, and bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from fewstep import api
from fewstep.cli.main import app
from fewstep.config.load import load_recipe
from fewstep.errors import UserError
from fewstep.evaluation import runner
from fewstep.evaluation.cost import affordable_prompts, evaluation_cost, nfe
from fewstep.evaluation.kept_images import PUBLISHED, model_fingerprint
from fewstep.evaluation.prompts import planned_evaluation, read_test_prompts
from fewstep.models.components import component_folder
from fewstep.models.pipeline import TextToImagePipeline, load

FEW = {"diversity_prompts": 1, "diversity_seeds": 2, "many_steps": 2}


def test_costs_are_counted_as_the_evaluation_works() -> None:
    cost = evaluation_cost(200, [nfe(50, True), nfe(4, False), nfe(4, True), nfe(4, False)], 16, 4)
    assert (cost.images, cost.passes) == (248, 116)
    assert "28,768 forward passes" in cost.text
    assert evaluation_cost(3, [1], 16, 4).images == 12  # fewer prompts than would have several seeds


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 200), (0.5, 76), (0.25, 15), (1e-6, 2)])
def test_as_many_prompts_are_measured_as_the_time_allows(fraction: float, expected: int) -> None:
    count = affordable_prompts(200, fraction, 16, 4)
    assert count == expected
    images = [evaluation_cost(each, [1], 16, 4).images for each in (count, count + 1)]
    assert count in (2, 200) or images[0] <= fraction * 248 < images[1]


@pytest.mark.parametrize(("max_minutes", "measured"), [(None, 6), (10.0, 6), (2.0, 3)])
def test_an_evaluation_is_bounded_and_states_its_cost(
    tiny: TextToImagePipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    max_minutes: float | None,
    measured: int,
) -> None:
    monkeypatch.setattr(runner, "expected_minutes", lambda *_: 3.5)  # of 7 images: 6 prompts, and 1 further seed
    prompts = [f"a fox and {i} dogs" for i in range(6)]
    found = api.evaluate(tiny, prompts, max_minutes=max_minutes, **FEW)
    assert found.run["prompt_list"] == prompts[:measured]
    stated = capsys.readouterr().err
    assert "in each of 1 settings" in stated
    if measured == 3:
        assert "the first 3 of 6 prompts, 4 images" in stated
        assert "about 2.0 min; all would take 3.5 min, and max_minutes is 2" in stated


def test_the_expected_time_is_that_of_the_work(tiny: TextToImagePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [f"a fox and {i} dogs" for i in range(12)]
    found = api.evaluate(tiny, prompts, max_minutes=1e-4, **FEW)  # 6 ms
    assert found.run["prompts"] == 2
    assert "the first 2 of 12 prompts" in capsys.readouterr().err


def own_run(tmp_path: Path, tiny_folder: Path, *more: str) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "a dog number {i}"}}\n' for i in range(40)))
    overrides = [f"teacher={tiny_folder}", f"prompts.source={prompts}", "prompts.column=text", "train.steps=1",
                 "train.batch_size=2", "train.sample_every=0", "train.precision=fp32", *more]  # fmt: skip
    api.distill("micro-decoupled", tmp_path / "run", overrides=overrides)
    return tmp_path / "run"


def test_a_run_ends_with_the_users_own_test_prompts(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def evaluate(model: TextToImagePipeline, *, prompts: list[str], **options: object) -> None:
        seen.update(options, prompts=prompts)

    monkeypatch.setattr(api, "_evaluate", evaluate)
    run = own_run(
        tmp_path, tiny_folder, "evaluate.num_prompts=7", "evaluate.validate_every=0", "evaluate.max_minutes=3"
    )
    prompts = seen["prompts"]
    assert isinstance(prompts, list)
    assert prompts
    assert all(prompt.startswith("a dog number") for prompt in prompts)
    assert seen["max_minutes"] == 3
    stated = capsys.readouterr().err
    assert f"after the training: evaluation on {len(prompts)} test prompts of {tmp_path / 'prompts.jsonl'}" in stated
    assert "at most about 3 min; evaluate.num_prompts, evaluate.max_minutes and evaluate.enabled change that" in stated
    assert read_test_prompts(None, 7, model=run / "student") == prompts  # fewstep evaluate run/student


def test_evaluations_of_other_models_ask_for_prompts(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no run with test prompts made it; name some: --prompts FILE"):
        read_test_prompts(None, 5, model=tiny_folder)
    done = CliRunner().invoke(app, ["evaluate", str(tiny_folder), "--out", str(tmp_path / "report")])
    assert done.exit_code == 1
    assert "no run with test prompts made it" in done.stderr
    assert "noto" in read_test_prompts(None, 5, model="micro")[0] + read_test_prompts(None, 5, model="micro")[1]


def test_a_planned_evaluation_is_the_counted_one() -> None:
    recipe = load_recipe("micro-aligned", ["evaluate.max_minutes=null", "prompts.source=emoji"])
    planned = planned_evaluation(recipe, recipe.evaluate, 200)
    assert "200 test prompts of emoji, 248 images in each of 4 settings, 28,768 forward passes" in planned
    assert "no limit" in planned
    assert load_recipe("micro-aligned", []).evaluate.max_minutes == 10


def test_an_interrupted_evaluation_measures_as_many_prompts_as_before(
    tiny: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"a fox and {i} dogs" for i in range(6)]
    monkeypatch.setattr(runner, "report_writer", lambda: None)  # nothing is finished, as if it were interrupted
    for minutes in (3.5, 9.0):
        monkeypatch.setattr(runner, "expected_minutes", lambda *_, minutes=minutes: minutes)
        found = api.evaluate(tiny, prompts, max_minutes=2.0, out=tmp_path, **FEW)
        assert found.run["prompts"] == 3
    assert "continues an interrupted one, of the first 3 of 6 prompts" in capsys.readouterr().err


def test_a_models_fingerprint_is_that_of_all_its_weights_and_settings(tiny_folder: Path) -> None:
    def changed(change: Callable[[TextToImagePipeline], object]) -> str:
        model = load(tiny_folder, "cpu")
        change(model)
        return model_fingerprint(model)

    def add(model: TextToImagePipeline, part: str) -> None:
        with torch.no_grad():
            next(model.components[part].parameters()).add_(1e-6)

    def other_steps(model: TextToImagePipeline) -> None:
        model.generation_config = model.generation_config.model_copy(update={"sampler": "sde"})

    same = changed(lambda _: None)
    assert changed(lambda _: None) == same
    others = {changed(lambda model, part=part: add(model, part)) for part in ("transformer", "text_encoder", "vae")}
    assert len({same, changed(other_steps), *others}) == 5


def test_the_bundled_teachers_published_images_are_its_own():
    """Else every demo would sample them again."""
    model = load("micro", "cpu")
    files = sorted((component_folder("micro") / PUBLISHED).glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["made_by"])["model"] == model_fingerprint(model)
