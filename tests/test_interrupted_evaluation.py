"""An evaluation continues from the images that an interrupted one has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_setup import STUDENT, TEACHER, seeds_used

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
