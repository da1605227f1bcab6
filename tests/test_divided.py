"""Images and scores divided among processes: each makes its share, and all have what one process makes."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from process_runs import distill
from watch_setup import WATCH_FEATURES, WATCHED

from fewstep.config.sections import WatchSettings
from fewstep.core.method import Shard
from fewstep.evaluation import validation
from fewstep.inference import divided
from fewstep.inference.divided import Divided
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams

PROMPTS = [
    f"a noto emoji of a red apple on a {color} background" for color in ("blue", "white", "pink", "red", "green")
]


def in_processes(count, work):
    """What ``work(divided)`` gives in each of ``count`` threads that gather like processes."""
    parts, barrier = [None] * count, threading.Barrier(count)

    def run(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait(60)
            found = list(parts)
            barrier.wait(60)
            return found

        return work(Divided(Shard(rank, count), gather))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_rows_are_covered_and_processes_have_equally_many(count):
    rows = [Divided(Shard(rank, count)).rows(5) for rank in range(count)]
    assert len({len(own) for own in rows}) == 1
    assert [row for own in rows for row in own][:5] == list(range(5))
    assert max(row for own in rows for row in own) == 4


@pytest.mark.parametrize("params", [None, SamplingParams(steps=2, seed=7), SamplingParams(seeds=(4, 4, 1, 0, 9))])
def test_images_are_those_of_one_process_and_each_makes_its_share(tiny, monkeypatch, params):
    expected = generate(tiny, PROMPTS, params).images
    made = []

    def counted(pipeline, prompts, *more):
        made.append(len(prompts))
        return generate(pipeline, prompts, *more)

    monkeypatch.setattr(divided, "generate", counted)
    copies = iter([copy.deepcopy(tiny) for _ in range(2)])
    found = in_processes(2, lambda shared: shared.generate(next(copies), PROMPTS, params))
    assert made == [3, 3]
    assert all(torch.equal(images, expected) for images in found)


def test_validation_is_that_of_one_process(tiny):
    settings = WatchSettings(diversity_prompts=3, diversity_seeds=2, teacher_steps=2)
    validator = validation.Validator(PROMPTS, ["emoji"], WATCHED, WATCH_FEATURES, settings)
    expected = validator(tiny, tiny)()
    copies = iter([copy.deepcopy(tiny) for _ in range(2)])

    def validate(shared):
        model = next(copies)
        return validator(model, model, shared)()

    for found in in_processes(2, validate):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_real_processes_validate_and_preview_as_one(tiny_folder, tmp_path):
    more = ("train.steps=2", "train.sample_every=2", "evaluate.validate_every=2", "evaluate.validation_prompts=3")
    for processes in (1, 2):
        distill(tiny_folder, tmp_path / str(processes), processes, *more)
    one, two = (
        [json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()][-1]
        for count in (1, 2)
    )
    measured = {key: value for key, value in one.items() if key.startswith("val/")}
    assert len(measured) >= 4
    assert {key: two[key] for key in measured} == pytest.approx(measured, rel=1e-3, abs=1e-4)
    previews = [sorted((tmp_path / str(count) / "previews").iterdir()) for count in (1, 2)]
    assert [path.name for path in previews[0]] == [path.name for path in previews[1]]
    for first, second in zip(*previews, strict=True):
        difference = np.asarray(Image.open(first), dtype=int) - np.asarray(Image.open(second), dtype=int)
        assert abs(difference).max() <= 1  # the weights are equal up to rounding
