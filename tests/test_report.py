"""Evaluation from settings to page, with stand-ins for the models: real images, degraded as each setting would."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_setup import STUDENT, TEACHER, emoji_prompts, model, seeds_used
from rich.console import Console

import fewstep.evaluation
from fewstep.errors import UserError
from fewstep.evaluation.metrics_file import ImageColumn, Metrics, Samples, targets
from fewstep.evaluation.report import render
from fewstep.evaluation.runner import evaluate
from fewstep.evaluation.settings import default_settings
from fewstep.evaluation.table import columns, format_number, print_short_summary, print_summary

__all__ = ["seeds_used"]  # a fixture

FD, DIVERSITY = "fd_teacher[open-nsfw]", "diversity[open-nsfw]"


def test_a_student_beside_its_teacher(seeds_used: list[list[int]], tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": s, "student/loss": 1 / s, "student/lr": 1}) + "\n" for s in (1, 2, 3)))
    prompts = emoji_prompts(6)
    found = evaluate(
        STUDENT, teacher=TEACHER, prompts=prompts, out=tmp_path / "report", seed=7, curves=log,
        diversity_prompts=2, diversity_seeds=3,
    )  # fmt: skip

    # Equal seeds in every setting: seed + i for image i, and others for the further images of a prompt.
    assert len(seeds_used) == 8
    assert all(seeds == list(range(7, 13)) for seeds in seeds_used[::2])
    assert all(seeds == list(range(13, 17)) for seeds in seeds_used[1::2])

    tree = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert list(tree["figures"]) == ["teacher_50", "teacher_4", "teacher_4_guided", "student_4"]
    many, few, guided, student = tree["figures"].values()
    assert many[FD] is None
    assert 0 < student[FD] < few[FD]
    assert 0 < tree["real"]["fd_real[open-nsfw]"] < few["fd_real[open-nsfw]"]  # two sets of real images: the floor
    assert (many["nfe"], few["nfe"], guided["nfe"], student["nfe"]) == (100, 4, 8, 4)
    assert many["seconds_per_image"] == 0.5
    assert many["object_acc"] >= student["object_acc"] >= few["object_acc"]
    assert sum(group["images"] for group in many["by_group"].values()) == 6
    assert [target["key"] for target in tree["targets"]][:3] == ["object_acc", "over_few_steps", "fd_teacher"]
    assert tree["features"] == "open-nsfw"
    assert 0.9 < tree["scorers"]["emoji"]["object_acc"] < 1
    assert (tree["run"]["device"], tree["run"]["dtype"], tree["run"]["first_seed"]) == ("cpu", "float32", 7)
    assert Metrics.load(tmp_path / "report" / "metrics.json") == found

    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page), "the page must be self-contained"
    assert "@import" not in page
    assert page.count("data:image/webp") == 5 * 6 + 5 * 2 * 3
    assert all(prompt in page for prompt in prompts)
    assert "FD to the teacher (open-nsfw)" in page
    assert "student/loss" in page
    assert "student/lr" not in page
    assert (tmp_path / "report" / "grid.png").stat().st_size > 1000


def test_further_models_have_a_column_each(seeds_used: list[list[int]], tmp_path: Path) -> None:
    other = model(steps=2, guidance_scale=0.0, guidance_distilled=True)
    options = {"compare": {"distilled": other}, "diversity_prompts": 1}
    found = evaluate(STUDENT, teacher=TEACHER, prompts=emoji_prompts(2), out=tmp_path, **options)
    assert list(found.figures) == ["teacher_50", "teacher_4", "teacher_4_guided", "distilled_2", "student_4"]
    assert (found.figures["distilled_2"]["nfe"], found.figures["student_4"]["nfe"]) == (2, 4)
    assert found.targets[0].value == pytest.approx(
        found.figures["student_4"]["object_acc"] / found.figures["teacher_50"]["object_acc"]
    )
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.index("distilled") < page.index("real")
    smaller = model(steps=2, guidance_scale=0.0, guidance_distilled=True)
    smaller.generation_config.height = 32
    with pytest.raises(UserError, match="distilled: it makes images of 32x64, the measured model of 64x64"):
        evaluate(STUDENT, compare={"distilled": smaller}, prompts=emoji_prompts(2))


def test_other_prompts_are_measured_without_scores(seeds_used: list[list[int]]) -> None:
    found = evaluate(STUDENT, prompts=["a quiet street", "two boats"], diversity_prompts=1)
    assert list(found.figures) == ["student_4"]
    figures = found.figures["student_4"]
    assert "object_acc" not in figures
    assert figures["fd_real[open-nsfw]"] is None
    assert figures["saturation"] > 0
    assert figures[DIVERSITY] > 0
    assert found.real == {}
    assert (found.run["scores"], found.run["scorers"], found.scorers) == ([], [], {})
    assert found.targets == []


def test_real_images_are_compared_where_prompts_have_some(seeds_used: list[list[int]], tmp_path: Path) -> None:
    prompts = ["a quiet street", *emoji_prompts(3)]
    found = evaluate(TEACHER, prompts=prompts, diversity_prompts=1, out=tmp_path)
    assert list(found.figures) == ["teacher_50"]
    assert found.run["prompts_scored"]["object_acc"] == 3
    assert found.figures["teacher_50"]["fd_real[open-nsfw]"] > 0
    assert found.real[DIVERSITY] is None  # its one prompt for diversity has no real images
    assert (tmp_path / "index.html").exists()


class Brightness:
    """A scorer of every image."""

    name = "brightness"

    def score(self, images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"brightness": images.float().mean(dim=(1, 2, 3)) / 255}


def test_a_scorer_adds_a_row(seeds_used: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(STUDENT, prompts=["a quiet street", "two boats"], scorers=[Brightness()], diversity_prompts=1)
    assert 0 < found.figures["student_4"]["brightness"] < 1
    print_summary(found)
    assert "brightness" in capsys.readouterr().out


class Warmth(Brightness):
    """A classifier without groups of prompts. Its score applies to the prompts with an "a"."""

    name = "warmth"
    accuracy = {"warm": 0.9, "images": 10}  # noqa: RUF012

    def score(self, images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"warm": torch.tensor([0.0 if "a" in prompt else float("nan") for prompt in prompts])}

    def predictions(self, images: torch.Tensor) -> list[str]:
        return ["cold <sun>"] * len(images)


def test_a_classifier_needs_no_groups(seeds_used: list[list[int]], tmp_path: Path) -> None:
    scorers = [Brightness(), Warmth()]
    prompts = ["a quiet street", "two boats", "one ship"]
    found = evaluate(STUDENT, prompts=prompts, scorers=scorers, diversity_prompts=1, out=tmp_path)
    assert found.run["scorers"] == ["brightness", "warmth"]
    assert found.run["prompts_scored"] == {"brightness": 3, "warm": 2}
    assert found.scorers == {"warmth": {"warm": 0.9, "images": 10}}
    assert found.figures["student_4"]["warm"] == 0  # the mean over the prompts that it applies to
    assert found.figures["student_4"]["by_group"] == {}
    assert (tmp_path / "index.html").read_text(encoding="utf-8").count("cold &lt;sun&gt;") == 2


def test_two_scorers_with_one_score_are_refused_first(seeds_used: list[list[int]]) -> None:
    class Again(Brightness):
        name = "again"

    with pytest.raises(UserError, match="two of them have a score brightness"):
        evaluate(STUDENT, prompts=["one", "two"], scorers=[Brightness(), Again()])
    assert seeds_used == []


def test_a_report_without_matplotlib_is_refused_first(
    seeds_used: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fewstep.evaluation.report", "fewstep.evaluation.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr(fewstep.evaluation, "plots")
    with pytest.raises(UserError, match=r"report needs matplotlib; pip install 'fewstep\[eval\]'"):
        evaluate(STUDENT, prompts=["one", "two"], out=tmp_path)
    assert seeds_used == []


def test_settings_follow_the_students_steps() -> None:
    settings = default_settings(model(steps=2, guidance_scale=0.0, guidance_distilled=True), TEACHER)
    assert [setting.name for setting in settings] == ["teacher_50", "teacher_2", "teacher_2_guided", "student_2"]
    assert [setting.guidance_scale for setting in settings] == [3.0, 0.0, 3.0, 0.0]
    assert settings[0].title == "teacher, 50 steps, guidance 3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["one"]}, "at least 2 prompts"),
        ({"diversity_seeds": 1}, "2 seeds"),
        ({"scorers": ["beauty"]}, "unknown scorer 'beauty'; known: emoji"),
        ({"scorers": ["clip_score"]}, "clip_score: give a checkpoint"),
        ({"features": "resnet"}, "unknown feature network 'resnet'"),
        ({"features": "dinov2"}, "dinov2: give a checkpoint"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(TEACHER, **{"prompts": ["one", "two"], **options})


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        evaluate(TEACHER, prompts=["one", "two"], out=tmp_path / "file")


def figures(**student: float) -> dict[str, dict[str, Any]]:
    base = {"object_acc": 0.8, FD: None, DIVERSITY: 0.5, "saturation": 0.4, "hf_energy": 0.01}
    few = base | {"steps": 4, "object_acc": 0.3, FD: 80.0}
    return {"t": base | {"steps": 50}, "few": few, "guided": few, "s": few | {"object_acc": 0.8} | student}


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({FD: 40.0}, [True] * 6),
        ({FD: 41.0, "object_acc": 0.75}, [False, True, False, True, True, True]),
        ({FD: 40.0, DIVERSITY: 0.39, "saturation": 0.47, "hf_energy": 0.008}, [True] * 3 + [False] * 3),
        ({FD: 40.0, "object_acc": 0.44}, [False, False, True, True, True, True]),
    ],
)
def test_targets_pass_or_fail(student: dict[str, float], expected: list[bool]) -> None:
    found = targets(figures(**student), "s", "t", "few", "guided", "open-nsfw")
    assert [target.passed for target in found] == expected


def test_a_target_that_cannot_be_measured_has_no_value() -> None:
    unmeasured = figures()
    unmeasured["few"] = unmeasured["few"] | {"object_acc": 0.0}
    target = targets(unmeasured, "s", "t", "few", "guided", "open-nsfw")[1]
    assert (target.value, target.passed) == (None, None)


def test_prompts_are_escaped_in_the_page() -> None:
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    samples = Samples(["<script>alert(1)</script>"], {"a_1": ImageColumn("a, 1 step", image, image[None], [None])})
    metrics = Metrics({"a_1": {"steps": 1, "guidance_scale": 0.0, "nfe": 1}}, features="f", run={"prompts": 1})
    page = render(metrics, samples, [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_summary_fits_a_terminal_and_names_the_scorer(seeds_used: list[list[int]]) -> None:
    found = evaluate(STUDENT, teacher=TEACHER, prompts=emoji_prompts(3), diversity_prompts=1)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(found, console)
    text = console.export_text()
    assert "Scorer emoji on" in text
    assert "object accuracy ÷ teacher's at 50 steps" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert list(columns(found)) == [*found.figures, "real"]

    print_short_summary(found, console)
    lines = console.export_text().splitlines()
    met = sum(target.passed is True for target in found.targets)
    head = next(index for index, line in enumerate(lines) if "object correct" in line)
    assert [line[: len(lines[head])].split("  ")[0] for line in lines[head:]] == [
        *("object correct", "nearest real correct", "FD to the teacher (open-nsfw)", "hf energy, ×1000"),
        *("time per image", f"targets met: {met} of 6; the report has all figures"),
    ]
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_numbers_have_three_digits() -> None:
    shown = [format_number(x) for x in (0.01234, 1.2345, 12.345, 123.45, -0.0512, 12345.0)]
    assert shown == ["0.012", "1.23", "12.3", "123", "-0.051", "12,345"]
