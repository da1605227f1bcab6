"""``fewstep lora choose``: the rule exactly, its measures exactly, and a run's checkpoints end to end."""

import json
from dataclasses import replace

import pytest
import torch
from lora_cli import run, succeed
from lora_training import few_step, image_set, run_lora

from fewstep.evaluation.lora_choice.measures import (
    likeness,
    likeness_within,
    memorization,
    prompts_recognized,
    relative_scores,
)
from fewstep.evaluation.lora_choice.rule import Figures, Reference, choose, ranking

__all__ = ["few_step", "image_set"]  # fixtures

WITHOUT = Figures(likeness=0.2, flexibility=1.0, memorization=3.0, saturation=0.3, hf_energy=0.01)
REAL = Figures(likeness=0.6, flexibility=1.0, memorization=1.0, saturation=0.4, hf_energy=0.008)
REFERENCE = Reference(WITHOUT, REAL)
GOOD = Figures(likeness=0.4, flexibility=1.0, memorization=1.0, saturation=0.4, hf_energy=0.01)


def test_figures_are_relative_to_images_without_the_lora_and_to_training_images():
    assert REFERENCE.learned(GOOD) == pytest.approx(0.5)
    assert REFERENCE.learned(replace(GOOD, likeness=0.1)) == 0
    assert REFERENCE.learned(replace(GOOD, likeness=0.9)) == 1
    assert Reference(REAL, WITHOUT).learned(GOOD) == 1  # nothing to learn
    assert REFERENCE.score(GOOD) == pytest.approx(2 / 3)
    assert REFERENCE.overbake(replace(GOOD, saturation=0.6)) == pytest.approx(1.5)
    assert REFERENCE.overbake(replace(GOOD, hf_energy=0.02)) == pytest.approx(2)


def test_the_limits_are_named():
    assert REFERENCE.exceeded(GOOD) == []
    assert REFERENCE.exceeded(replace(GOOD, flexibility=0.9, memorization=0.5, saturation=0.4599)) == []
    bad = replace(GOOD, flexibility=0.89, memorization=0.49, saturation=0.48)
    assert REFERENCE.exceeded(bad) == [
        "flexibility 0.89, below 0.9",
        "memorization 0.49, below 0.5",
        "overbake 1.20, above 1.15",
    ]
    assert REFERENCE.exceeded(replace(GOOD, hf_energy=0.0064)) == []
    assert REFERENCE.exceeded(replace(GOOD, hf_energy=0.006)) == ["sharpness 0.75, below 0.8"]


def test_the_best_within_the_limits_is_chosen_and_ties_go_to_the_first():
    candidates = {
        "step 1": replace(GOOD, likeness=0.3),
        "step 2": GOOD,
        "step 3": replace(GOOD, likeness=0.4001),
        "step 4": replace(GOOD, likeness=0.6, hf_energy=0.02),
    }
    assert ranking(candidates, REFERENCE) == ["step 2", "step 3", "step 1", "step 4"]
    choice = choose(candidates, REFERENCE)
    assert (choice.best, choice.runner_up) == ("step 2", "step 3")
    assert choice.reasons[0].startswith("step 2: score 0.67, likeness 0.50 of the way")
    assert choice.reasons[-1] == "step 4 exceeds: overbake 2.00, above 1.15."


def test_where_all_exceed_a_limit_the_fewest_count():
    candidates = {"a": replace(GOOD, flexibility=0.1, memorization=0.1), "b": replace(GOOD, likeness=0.3, hf_energy=1)}
    choice = choose(candidates, REFERENCE)
    assert (choice.best, choice.runner_up) == ("b", "a")
    assert "No candidate is within all limits; b exceeds the fewest" in choice.reasons[1]
    assert choose({"a": GOOD}, REFERENCE).runner_up is None


def test_likeness_and_memorization_by_hand():
    real = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    half = 2**-0.5
    assert likeness(torch.tensor([[5.0, 0.0]]), real) == pytest.approx((1 + 0 + half) / 3)
    assert likeness_within(real) == pytest.approx((0 + half + half) / 3)
    assert memorization(torch.tensor([[9.0, 0.0]]), real) == pytest.approx(0)
    assert memorization(torch.tensor([[-1.0, 0.0]]), real) == pytest.approx(1 / (1 - half))
    assert memorization(real, torch.ones(3, 2)) == 1


def test_flexibility_by_hand():
    assert relative_scores({"a": 0.4, "b": 3.0}, {"a": 0.5, "b": 2.0}) == pytest.approx((0.8 + 1) / 2)
    assert relative_scores({"a": -1.5}, {"a": -1.0}) == pytest.approx(0.5)
    assert relative_scores({"a": 0.0}, {"a": 0.0}) == 1
    without = torch.eye(3)
    assert prompts_recognized(without, without) == 1
    assert prompts_recognized(without[[0, 0, 0]], without) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def trained(few_step, image_set, tmp_path_factory):
    """A run with the checkpoints of two steps; the second one's LoRA is much larger."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_lora(folder, f"model={few_step}", f"data.images={image_set}", "train.steps=4", "train.save_every=2")
    return folder


def test_a_run_is_compared_resumed_and_reported(trained, tmp_path, monkeypatch):
    from fewstep.evaluation.lora_choice import measured

    out, made, generate = tmp_path / "choice", [], measured.generate

    def interrupted(*arguments):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(measured, "generate", interrupted)
    words = ("lora", "choose", trained, "--count", "2", "--out", out)
    assert run(*words).exit_code
    assert len(list((out / ".images").iterdir())) == 2
    printed = succeed(*words).stdout
    assert len(made) == 3 + 5  # without and step 2 were kept; step 4 and four strengths

    found = json.loads((out / "choice.json").read_text())
    assert list(found["checkpoints"]["figures"]) == ["step 2", "step 4"]
    assert list(found["strengths"]["figures"]) == [f"strength {each}" for each in ("0.4", "0.6", "0.8", "1", "1.2")]
    assert f"{found['file']}:{found['strength']:g}" in printed
    at_one = found["strengths"]["figures"]["strength 1"]
    assert at_one == found["checkpoints"]["figures"][found["checkpoints"]["best"]]
    assert found["checkpoints"]["figures"]["step 2"] != found["checkpoints"]["figures"]["step 4"]
    page = (out / "index.html").read_text()
    assert page.count("<img") == 4 * 3 + 4 * 6
    assert "<svg" in page
    assert not (out / ".images").exists()


def test_a_lora_of_the_base_is_compared_on_the_student(few_step, tiny_folder, image_set, tmp_path):
    run_lora(tmp_path / "run", f"model={tiny_folder}", f"data.images={image_set}", "train.steps=2")
    words = ("lora", "choose", tmp_path / "run", "--count", "2", "--out")
    succeed(*words, tmp_path / "student", "--model", few_step)
    printed = succeed(*words, tmp_path / "base")
    assert "is a multi-step model" in printed.stderr
    found = {name: json.loads((tmp_path / name / "choice.json").read_text()) for name in ("student", "base")}
    assert found["student"]["settings"]["model"] == str(few_step)
    assert found["student"]["checkpoints"]["figures"] != found["base"]["checkpoints"]["figures"]
