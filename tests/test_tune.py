"""Searches on a tiny model: rungs, resumption, failures, and that test prompts stay closed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fewstep import api
from fewstep.config.load import load_recipe, parse_recipe
from fewstep.config.recipe import DistillRecipe
from fewstep.core.registry import load_plugins, prompt_sources, scorers
from fewstep.errors import UserError
from fewstep.training.optim import learning_rate
from fewstep.training.tracking import read_metrics
from fewstep.tuning.results import print_table, ranked
from fewstep.tuning.study import KILLED, Study
from fewstep.tuning.tune import TuneResult, tune

SPLITS = {
    "train": [f"a fox number {index}" for index in range(6)],
    "validation": ["a cat", "a dog", "a bee"],
    "test": ["a secret", "another secret"],
}
SPACE = "metric: brightness\ndirection: max\noptim.student.lr: {low: 1.0e-4, high: 1.0e-1, log: true}\n"


class Brightness:
    """The mean of an image, and what it was called with."""

    name = "brightness"
    seen: ClassVar[set[str]] = set()
    before: ClassVar[list[Callable[[], object]]] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        if images.any():  # black images only ask which scores apply
            Brightness.seen |= set(prompts)
            if Brightness.before:
                Brightness.before.pop(0)()
        return {"brightness": images.float().mean(dim=(1, 2, 3))}


class ClosedTest:
    """Prompts whose test split must not be opened."""

    def __init__(self, settings: object) -> None:
        pass

    def texts(self, split: str) -> list[str]:
        assert split != "test", "a search opened the test prompts"
        return SPLITS[split]


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugins()
    monkeypatch.setitem(scorers._entries, "brightness", Brightness)
    monkeypatch.setitem(prompt_sources._entries, "closed", ClosedTest)
    monkeypatch.setattr(Brightness, "seen", set())
    monkeypatch.setattr(Brightness, "before", [])


def recipe_of(folder: Path, **train: object) -> DistillRecipe:
    tree = {
        "kind": "distill",
        "name": "small",
        "teacher": str(folder),
        "student": {"steps": 1},
        "method": {
            "name": "dmd",
            "terms": {"cfg_augmentation": {}, "distribution_matching": {}},
            "fake_score_updates": 1,
        },
        "optim": {"student": {"lr": 1e-3, "lr_schedule": "cosine", "ema_decay": 0.5}, "fake_score": {"lr": 1e-3}},
        "train": {"steps": 4, "batch_size": 1, "on_alert": "off", **train},
        "prompts": {"source": "closed"},
        "evaluate": {"scorers": ["brightness"], "validation_prompts": 2},
    }
    found = parse_recipe(tree, "small")
    assert isinstance(found, DistillRecipe)
    return found


def search(folder: Path, out: Path, space: str = SPACE, **options: object) -> TuneResult:
    file = out.with_suffix(".yaml")
    file.write_text(space, encoding="utf-8")
    settings = {"minutes": 60, "trials": 3, "trial_steps": 4, "rungs": 2, **options}
    return tune(recipe_of(folder), file, out=out, **settings)  # type: ignore[arg-type]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_search_from_start_to_the_distillation_of_its_best_recipe(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = search(tiny_folder, tmp_path / "out")
    assert Brightness.seen == set(SPLITS["validation"][:2])  # validation prompts, and no others
    first, best = found.rows[0], found.best
    assert first.values == {"optim.student.lr": 1e-3}  # the recipe's own value
    assert [row.steps for row in found.rows] == [4, 4, 4]
    assert {row.state for row in found.rows} <= {"finished", "stopped"}
    assert [len(row.scores) for row in found.rows] == [2 if row.state == "finished" else 1 for row in found.rows]
    assert [row.taken for row in found.rows] == [4 if row.state == "finished" else 2 for row in found.rows]
    finished = [row for row in found.rows if row.state == "finished"]
    assert best == max(finished, key=lambda row: row.scores[-1])
    # the schedule of a trial is that of its full length, before and after the rung
    optim, lines = recipe_of(tiny_folder).optim["student"], read_metrics(tmp_path / "out/trials/0000/metrics.jsonl")
    rates = {line["step"]: line["student/lr"] for line in lines}
    expected = [sum(learning_rate(optim, step, 4) for step in pair) / 2 for pair in ((1, 2), (3, 4))]
    assert [rates[2], rates[4]] == pytest.approx(expected)
    assert not list((tmp_path / "out/trials").glob("*/checkpoints"))

    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == [row.state for row in found.rows]
    assert float(rows[0]["brightness@1"]) == pytest.approx(first.scores[1], rel=1e-5)
    assert json.loads(rows[0]["optim.student.lr"]) == 1e-3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page
    assert f"{best.scores[-1]:.4g}" in page
    print_table(found.search, found.rows)
    assert "best trials by brightness" in capsys.readouterr().out

    # best.yaml trains as the best trial did
    assert found.recipe is not None
    recipe = load_recipe(found.recipe)
    assert isinstance(recipe, DistillRecipe)
    assert recipe.optim["student"].lr == best.values["optim.student.lr"]
    assert (recipe.name, recipe.train.steps, recipe.train.on_alert) == ("small-tuned", 4, "off")
    validated = ["evaluate.enabled=false", "evaluate.validate_every=4"]
    api_source = lambda settings: OpenTest()  # noqa: E731
    prompt_sources._entries["closed"] = api_source
    api.distill(found.recipe, tmp_path / "run", overrides=validated)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["val/brightness"] == best.scores[-1]

    # the same command has nothing left to do
    prompt_sources._entries["closed"] = ClosedTest
    assert search(tiny_folder, tmp_path / "out").rows == found.rows


class OpenTest:
    """The same prompts for a distillation, which checks that nothing trains on the test prompts."""

    def texts(self, split: str) -> list[str]:
        return SPLITS[split]


@pytest.mark.slow
def test_an_interrupted_trial_continues_where_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    whole = search(tiny_folder, tmp_path / "whole", trials=1)
    Brightness.before[:] = [lambda: None, interrupt]  # at the second rung
    with pytest.raises(KeyboardInterrupt):
        search(tiny_folder, tmp_path / "parts", trials=1)
    state = Study(tmp_path / "parts/study.db", whole.search.space, whole.search.objective).rows()
    assert [(row.state, len(row.scores), row.taken) for row in state] == [("paused", 1, 2)]
    assert (tmp_path / "parts/trials/0000/checkpoints/step_00000002").exists()
    continued = search(tiny_folder, tmp_path / "parts", trials=1)
    assert [row.state for row in continued.rows] == ["finished"]
    assert continued.rows[0].scores == whole.rows[0].scores  # bit for bit
    steps = [line["step"] for line in read_metrics(tmp_path / "parts/trials/0000/metrics.jsonl")]
    assert steps == [2, 4]


def test_a_trial_whose_process_ended_is_failed(tiny_folder: Path, tmp_path: Path) -> None:
    found = search(tiny_folder, tmp_path / "out", trials=1, trial_steps=1)
    store = Study(tmp_path / "out/study.db", found.search.space, found.search.objective)
    store.next_trial().passes(0, 1e9)  # begun and measured, and then no more of it
    found = search(tiny_folder, tmp_path / "out", trials=2, trial_steps=1)
    killed = found.rows[1]
    assert (killed.state, killed.reason, killed.scores) == ("failed", KILLED, [1e9])
    assert found.best == found.rows[0]
    assert killed not in ranked(found.rows, found.search.objective)


@pytest.mark.slow
def test_a_killed_search_continues(tiny_folder: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "import test_tune as t\n"
        "t.load_plugins()\n"
        "t.scorers.register('brightness', t.Brightness); t.prompt_sources.register('closed', t.ClosedTest)\n"
        "t.Brightness.before[:] = [lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL)]\n"
        "t.search(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_folder), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = search(tiny_folder, tmp_path / "out", trials=2)
    killed, other = found.rows
    assert (killed.state, killed.reason, len(killed.scores)) == ("failed", KILLED, 1)
    assert found.best == other


def test_trials_that_fail_have_their_reason_and_the_others_run(tiny_folder: Path, tmp_path: Path) -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    Brightness.before[:] = [out_of_memory]
    found = search(tiny_folder, tmp_path / "out", f"{SPACE}init: [null, nowhere]\n", trials=4, trial_steps=1, rungs=1)
    failed = [row for row in found.rows if row.state == "failed"]
    assert failed[0].reason == "out of memory"
    assert all(row.reason.startswith("nowhere: ") for row in failed[1:])
    assert {row.values["init"] for row in failed[1:]} == {"nowhere"}
    assert found.best is not None
    assert found.best.values["init"] is None


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_ends(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.tuning.session.MAX_FAILURES", 2)
    with pytest.raises(UserError, match="2 trials in a row failed, the last one: nowhere"):
        search(tiny_folder, tmp_path / "out", f"{SPACE}init: [nowhere, nowhere2]\n", trials=50)


def test_a_diverging_trial_fails(tiny_folder: Path, tmp_path: Path) -> None:
    space = "metric: brightness\ndirection: max\noptim.student.lr: [1.0e+30, 2.0e+30]\n"
    found = search(tiny_folder, tmp_path / "out", space, trials=1, trial_steps=30)
    assert [(row.state, "not finite" in row.reason) for row in found.rows] == [("failed", True)]
    assert found.best is None


@pytest.mark.slow
def test_minutes_give_the_steps_and_end_the_search(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.tuning.trials.seconds_per_step", lambda trainer, steps: 0.1)
    length = {"trial_steps": None, "trials": 1}
    short = search(tiny_folder, tmp_path / "out", minutes=0.006, trial_minutes=0.005, **length)
    assert (short.rows[0].state, short.rows[0].steps) == ("paused", 3)  # 0.3 seconds
    # with more minutes the same search continues, and its trials keep their length
    more = search(tiny_folder, tmp_path / "out", minutes=60, **length)
    assert more.search.trial_minutes == 0.005
    assert [(row.state, row.steps, row.taken) for row in more.rows] == [("finished", 3, 3)]


@pytest.mark.slow
def test_another_search_is_refused_and_other_files_stay(tiny_folder: Path, tmp_path: Path) -> None:
    short = {"trials": 1, "trial_steps": 1, "rungs": 1}
    search(tiny_folder, tmp_path / "out", **short)
    with pytest.raises(UserError, match=r"holds another search \(space.optim.student.lr.high: 0.1 -> 0.2\)"):
        search(tiny_folder, tmp_path / "out", SPACE.replace("1.0e-1", "2.0e-1"), **short)
    (tmp_path / "out/notes.txt").write_text("mine")
    search(tiny_folder, tmp_path / "out", SPACE.replace("1.0e-1", "2.0e-1"), overwrite=True, **short)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_distance_to_the_teacher_as_the_objective(tiny_folder: Path, tmp_path: Path) -> None:
    space = "optim.student.lr: {low: 1.0e-4, high: 1.0e-1, log: true}\n"
    found = search(tiny_folder, tmp_path / "out", space, metric="fd_teacher", trials=1, trial_steps=1, rungs=1)
    assert (found.search.objective.metric, found.search.objective.direction) == ("fd_teacher[open-nsfw]", "min")
    assert found.rows[0].scores[0] > 0
    assert Brightness.seen == set(SPLITS["validation"][:2])


@pytest.mark.slow
def test_processes_share_a_search(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a fox number {index}" for index in range(40)))
    (tmp_path / "space.yaml").write_text(SPACE.replace("brightness", "hf_energy"))
    tree = recipe_of(tiny_folder).model_dump(mode="json")
    tree["prompts"] = {"source": str(tmp_path / "prompts.txt")}
    tree["evaluate"] |= {"scorers": None}
    recipe = parse_recipe(tree, "small")
    assert isinstance(recipe, DistillRecipe)
    found = tune(
        *(recipe, tmp_path / "space.yaml"), minutes=60, out=tmp_path / "out", trials=5, trial_steps=2, rungs=1, jobs=2
    )
    assert [row.state for row in found.rows] == ["finished"] * 5
    assert len({row.values["optim.student.lr"] for row in found.rows}) == 5
