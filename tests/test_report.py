"""Evaluation from arms to page, with stand-ins for the models: real images, spoilt as each arm would spoil them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from fewstep.data.images import to_uint8
from fewstep.emoji.classifier import ClassifierNet, EmojiClassifier
from fewstep.emoji.dataset import EmojiDataset
from fewstep.errors import UserError
from fewstep.evaluation import plots
from fewstep.evaluation import runner as module
from fewstep.evaluation.metrics_file import ImageColumn, Metrics, Samples, targets
from fewstep.evaluation.report import render
from fewstep.evaluation.runner import ARM_FIGURES, default_settings, emoji_prompts, evaluate
from fewstep.evaluation.table import columns, format_number, print_summary
from fewstep.inference.generate import GenerationResult
from fewstep.inference.params import SamplingParams


def model(**card: Any) -> Any:
    return SimpleNamespace(generation_config=SimpleNamespace(height=64, width=64, **card))


TEACHER = model(steps=50, guidance_scale=3.0, guidance_distilled=False)
STUDENT = model(steps=4, guidance_scale=0.0, guidance_distilled=True)


@pytest.fixture
def seeds_seen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Replaces generation; returns the seeds of each call."""
    world = EmojiDataset.load()
    seen: list[list[int]] = []

    def generate(model: Any, prompts: list[str], params: SamplingParams, callback: Any):
        seeds = [params.seed + i for i in range(len(prompts))]
        seen.append(seeds)
        concepts = [world.parse(prompt) or world.sample(1, "all")[0] for prompt in prompts]
        images = torch.cat(
            [world.render([c], torch.Generator().manual_seed(s)) for c, s in zip(concepts, seeds, strict=True)]
        )
        assert params.steps is not None
        if params.steps < 50:
            images = F.interpolate(F.avg_pool2d(images, 2 if model is STUDENT else 8), 64)
        forwards = params.steps * (2 if params.guidance_scale else 1)
        return GenerationResult(to_uint8(images), forwards, 0.5 * len(images))

    monkeypatch.setattr(module, "generate", generate)
    return seen


@pytest.fixture(scope="module")
def judge() -> EmojiClassifier:
    """Untrained: what is tested here is the bookkeeping."""
    torch.manual_seed(0)
    codes = [item.code for item in EmojiDataset.load().objects]
    accuracy = {"object_acc": 0.991, "style_acc": 0.99, "background_acc": 1.0, "images": 1832}
    return EmojiClassifier(ClassifierNet(len(codes), 8), {"objects": codes, "base_channels": 8, "accuracy": accuracy})


def test_a_student_beside_its_teacher(seeds_seen: list[list[int]], judge: EmojiClassifier, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": s, "student/loss": 1 / s, "student/lr": 1}) + "\n" for s in (1, 2, 3)))
    prompts = emoji_prompts(6)
    found = evaluate(
        STUDENT, teacher=TEACHER, prompts=prompts, out=tmp_path / "report", seed=7, judge=judge, curves=log,
        diversity_prompts=2, diversity_seeds=3,
    )  # fmt: skip

    # The same seeds in every arm: seed + i for image i, and others for the further images of a prompt.
    assert len(seeds_seen) == 8
    assert all(seeds == list(range(7, 13)) for seeds in seeds_seen[::2])
    assert all(seeds == list(range(13, 17)) for seeds in seeds_seen[1::2])

    tree = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert list(tree["arms"]) == ["teacher_50", "teacher_4", "teacher_4_guided", "student_4"]
    for arm in tree["arms"].values():
        assert set(ARM_FIGURES) | {"by_language"} == set(arm)
    many, few, guided, student = tree["arms"].values()
    assert many["fd_teacher"] is None
    assert 0 < student["fd_teacher"] < few["fd_teacher"]
    assert 0 < tree["real"]["fd_real"] < few["fd_real"]  # two sets of real images: the floor
    assert (many["forwards"], few["forwards"], guided["forwards"], student["forwards"]) == (100, 4, 8, 4)
    assert many["seconds_per_image"] == 0.5
    assert sum(language["images"] for language in many["by_language"].values()) == 6
    assert len(tree["targets"]) == 6
    assert list(tree["judge"].values()) == list(judge.accuracy.values())
    assert Metrics.load(tmp_path / "report" / "metrics.json") == found

    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page), "the page must need nothing else"
    assert "@import" not in page
    assert page.count("data:image/webp") == 5 * 6 + 5 * 2 * 3
    assert all(prompt in page for prompt in prompts)
    assert "student/loss" in page
    assert "student/lr" not in page
    assert (tmp_path / "report" / "grid.png").stat().st_size > 1000


def test_prompts_from_elsewhere_are_measured_but_not_judged(
    seeds_seen: list[list[int]], judge: EmojiClassifier
) -> None:
    found = evaluate(STUDENT, prompts=["a quiet street", "two boats"], judge=judge, diversity_prompts=1)
    assert list(found.arms) == ["student_4"]
    arm = found.arms["student_4"]
    assert arm["name_top1"] is arm["fd_real"] is None
    assert arm["saturation"] > 0
    assert arm["diversity"] > 0
    assert found.real == {}
    assert found.targets == []


def test_mixed_prompts_are_compared_with_real_images_where_there_are_any(
    seeds_seen: list[list[int]], judge: EmojiClassifier, tmp_path: Path
) -> None:
    prompts = ["a quiet street", *emoji_prompts(3)]
    found = evaluate(TEACHER, prompts=prompts, judge=judge, diversity_prompts=1, out=tmp_path)
    assert list(found.arms) == ["teacher_50"]
    assert found.settings["prompts_judged"] == 3
    assert found.arms["teacher_50"]["fd_real"] > 0
    assert found.real["diversity"] is None  # its one prompt for diversity has no real images
    assert (tmp_path / "index.html").exists()


def test_arms_follow_the_students_steps() -> None:
    arms = default_settings(model(steps=2, guidance_scale=0.0, guidance_distilled=True), TEACHER)
    assert [arm.name for arm in arms] == ["teacher_50", "teacher_2", "teacher_2_guided", "student_2"]
    assert [arm.guidance_scale for arm in arms] == [3.0, 0.0, 3.0, 0.0]
    assert arms[0].title == "teacher, 50 steps, guidance 3"


def test_what_cannot_be_evaluated_is_said_in_one_line(judge: EmojiClassifier, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2 prompts"):
        evaluate(TEACHER, prompts=["one"], judge=judge)
    with pytest.raises(UserError, match="2 seeds"):
        evaluate(TEACHER, prompts=["one", "two"], judge=judge, diversity_seeds=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        evaluate(TEACHER, prompts=["one", "two"], judge=judge, out=tmp_path / "file")


def arms(**student: float) -> dict[str, dict[str, Any]]:
    base = {"name_top1": 0.8, "fd_teacher": None, "diversity": 0.5, "saturation": 0.4, "hf_energy": 0.01}
    few = base | {"steps": 4, "name_top1": 0.3, "fd_teacher": 80.0}
    return {"t": base | {"steps": 50}, "few": few, "guided": few, "s": few | {"name_top1": 0.8} | student}


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"fd_teacher": 40.0}, [True] * 6),
        ({"fd_teacher": 41.0, "name_top1": 0.75}, [False, True, False, True, True, True]),
        ({"fd_teacher": 40.0, "diversity": 0.39, "saturation": 0.47, "hf_energy": 0.008}, [True] * 3 + [False] * 3),
        ({"fd_teacher": 40.0, "name_top1": 0.44}, [False, False, True, True, True, True]),
    ],
)
def test_claims_hold_or_fall_short(student: dict[str, float], expected: list[bool]) -> None:
    assert [target.holds for target in targets(arms(**student), "s", "t", "few", "guided")] == expected


def test_a_claim_without_a_number_says_so() -> None:
    unmeasured = arms()
    unmeasured["few"] = unmeasured["few"] | {"name_top1": 0.0}
    target = targets(unmeasured, "s", "t", "few", "guided")[1]
    assert (target.value, target.holds) == (None, None)


def page_of(prompt: str) -> str:
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    samples = Samples([prompt], {"a_1": ImageColumn("a, 1 step, no guidance", image, image[None], [None])})
    figures = {"name_top1": None, "steps": 1, "guidance_scale": 0.0, "forwards": 1}
    return render(Metrics({"a_1": figures}, settings={"prompts": 1}), samples, [])


def test_a_prompt_cannot_write_into_the_page() -> None:
    page = page_of("<script>alert(1)</script>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_summary_fits_a_terminal_and_names_the_judge(seeds_seen: list[list[int]], judge: EmojiClassifier) -> None:
    found = evaluate(STUDENT, teacher=TEACHER, prompts=emoji_prompts(3), judge=judge, diversity_prompts=1)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_summary(found, console)
    text = console.export_text()
    assert "99.1%" in text
    assert "name accuracy ÷ teacher's at 50 steps" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert list(columns(found)) == [*found.arms, "real"]


def test_numbers_have_three_digits() -> None:
    shown = [format_number(x) for x in (0.01234, 1.2345, 12.345, 123.45, -0.0512, 12345.0)]
    assert shown == ["0.012", "1.23", "12.3", "123", "-0.051", "12,345"]


def test_smoothing_averages_neighbours() -> None:
    assert plots.smooth([1.0, 2.0, 3.0, 4.0, 6.0], window=3) == pytest.approx([1.5, 2, 3, 13 / 3, 5])
    assert plots.curves([]) is None
