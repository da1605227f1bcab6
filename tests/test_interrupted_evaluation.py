"""An evaluation takes images that were made before: by an interrupted one, or published with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_setup import STUDENT, TEACHER, emoji_prompts, seeds_used
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.evaluation import image_sets, kept_images
from fewstep.evaluation.metrics_file import Metrics
from fewstep.evaluation.runner import evaluate
from fewstep.evaluation.settings import Setting
from fewstep.inference.generate import GenerationResult
from fewstep.inference.params import SamplingParams

__all__ = ["seeds_used"]  # a fixture


def test_an_interrupted_evaluation_continues(
    seeds_used: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a quiet street", "two boats", "a hill"]
    options: dict[str, Any] = {"diversity_prompts": 1, "diversity_seeds": 2}
    options["out"] = tmp_path / "report"
    generate = image_sets.generate

    def interrupted(model: Any, prompts: list[str], params: SamplingParams, callback: Any) -> GenerationResult:
        if len(seeds_used) == 3:
            raise KeyboardInterrupt
        return generate(model, prompts, params, callback)

    def measure(**changed: Any) -> Metrics:
        return evaluate(STUDENT, teacher=TEACHER, prompts=prompts, **(options | changed))

    monkeypatch.setattr(image_sets, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure()
    kept = sorted(path.name for path in (tmp_path / "report" / ".images").iterdir())
    assert kept == ["teacher_4.safetensors", "teacher_50-seeds.safetensors", "teacher_50.safetensors"]

    monkeypatch.setattr(image_sets, "generate", generate)
    seeds_used.clear()
    found = measure()
    assert len(seeds_used) == 8 - 3  # calls: two for each setting
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["grid.png", "index.html", "metrics.json"]
    assert measure(out=None) == found
    assert len(seeds_used) == 5 + 8


@pytest.mark.parametrize(
    ("changed", "calls"),
    [
        ({}, 0),
        ({"seed": 1}, 2),
        ({"prompts": ["a hill", "a cow", "a cat"]}, 1),  # the prompt with several seeds is the same
        ({"settings": [Setting("one", STUDENT, 5, 0.0)]}, 2),
        ({"settings": [Setting("one", STUDENT, 4, 1.0)]}, 2),
        ({"settings": [Setting("one", TEACHER, 4, 0.0)]}, 2),
    ],
)
def test_images_of_another_evaluation_are_not_used(
    seeds_used: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Any, calls: int
) -> None:
    monkeypatch.setattr(kept_images.KeptImages, "delete", lambda _: None)  # as if it were always interrupted
    options: dict[str, Any] = {"prompts": ["a hill", "a cow", "a dog"], "settings": [Setting("one", STUDENT, 4, 0.0)]}
    evaluate(STUDENT, **options, out=tmp_path, diversity_prompts=1)
    seeds_used.clear()
    evaluate(STUDENT, **(options | changed), out=tmp_path, diversity_prompts=1)
    assert len(seeds_used) == calls


def test_images_that_come_with_the_teacher_are_taken_where_it_makes_the_same(
    seeds_used: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = emoji_prompts(12)
    options: dict[str, Any] = {"teacher": TEACHER, "diversity_prompts": 2, "diversity_seeds": 2}
    monkeypatch.setattr(kept_images.KeptImages, "delete", lambda _: None)
    plain = evaluate(STUDENT, prompts=prompts, out=tmp_path, **options)
    published = tmp_path / kept_images.KEPT
    for file in published.glob("[!.]*_4*"):
        file.unlink()
    seeds_used.clear()
    found = evaluate(STUDENT, prompts=prompts, published=published, **options)
    assert found.figures == plain.figures
    assert [len(seeds) for seeds in seeds_used] == [8] + 3 * [12, 2]  # a few images, to check them

    file = published / "teacher_50.safetensors"
    with safe_open(file, "pt") as opened:
        images, metadata = opened.get_tensor("images"), opened.metadata()
    save_file({"images": 255 - images}, file, metadata)
    seeds_used.clear()
    assert evaluate(STUDENT, prompts=prompts, published=published, **options).figures == plain.figures
    assert [len(seeds) for seeds in seeds_used] == [8] + 4 * [12, 2]
    assert "the images that come with the model differ from those made here; making all" in capsys.readouterr().err
