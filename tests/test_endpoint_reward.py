"""The reward of a vision-language endpoint, against a server in the test."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chat_server import Server, running_chat

from fewstep.errors import StopTraining, UserError
from fewstep.rewards.combine import WeightedRewards
from fewstep.rewards.endpoint import KEY, EndpointReward, parse_grade
from fewstep.rewards.open import open_reward


@pytest.fixture
def server() -> Iterator[Server]:
    with running_chat() as one:
        yield one


def gray(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def judge(server: Server, cache: Path, **options: object) -> EndpointReward:
    return EndpointReward(server.spec, cache=cache, pause=0.01, **options)


def test_grades_are_asked_once_and_cached(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    prompts = ["a cat", "a dog", "a cat"]
    assert judge(server, tmp_path)(gray(0.2, 0.8, 0.8), prompts).tolist() == pytest.approx([0.2, 0.8, 0.8])
    assert len(server.requests) == 3
    assert set(server.keys) == {"Bearer secret"}
    asked = server.requests[0]
    assert asked["model"] == "tiny-vlm"
    assert "Prompt: a" in asked["messages"][1]["content"][0]["text"]
    assert judge(server, tmp_path)(gray(0.2, 0.8), prompts[:2]).tolist() == pytest.approx([0.2, 0.8])
    assert len(server.requests) == 3
    judge(server, tmp_path, rubric="another")(gray(0.2), ["a cat"])
    assert len(server.requests) == 4
    assert not any("secret" in file.read_text() for file in tmp_path.rglob("*.json"))


def test_passing_failures_are_repeated(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    server.plan = [(503, "busy", 0.0), (429, "slow down", 0.0), (200, "no grade", 0.0)]
    reward = judge(server, tmp_path, attempts=3)
    assert reward(gray(0.4), ["x"]).isnan().all()  # an answer, but no number
    assert len(server.requests) == 3
    assert server.keys == [None] * 3
    assert reward(gray(0.4), ["x"]).tolist() == pytest.approx([0.4])  # nothing was cached


def test_slow_answers_are_given_up(server: Server, tmp_path: Path) -> None:
    server.plan = [(200, None, 0.6), (200, None, 0.0)]
    start = time.monotonic()
    assert judge(server, tmp_path, timeout=0.2)(gray(0.6), ["x"]).tolist() == pytest.approx([0.6])
    assert time.monotonic() - start < 5
    server.plan = [(200, None, 0.5)] * 2
    assert judge(server, tmp_path, timeout=0.1, attempts=2)(gray(0.8), ["x"]).isnan().all()


def test_refused_requests_are_one_line(server: Server, tmp_path: Path) -> None:
    server.plan = [(401, '{"error": "bad key"}', 0.0)]
    with pytest.raises(UserError, match=r"the request for tiny-vlm was refused: 401 .*bad key"):
        judge(server, tmp_path)(gray(0.5), ["x"])


def test_an_endpoint_that_is_gone_stops_the_training(server: Server, tmp_path: Path) -> None:
    gone = EndpointReward("http://127.0.0.1:9/v1#none", cache=tmp_path, pause=0.0, attempts=2)
    combined = WeightedRewards({"judge": (gone, 1.0)}, 4)
    assert combined(gray(0.5, 0.6), ["a", "b"]).isnan().all()
    with pytest.raises(StopTraining, match="judge: no score for 100% of the last 16 images"):
        combined(gray(*[0.5] * 14), ["a"] * 14)


def test_a_damaged_cache_file_is_written_anew(server: Server, tmp_path: Path) -> None:
    judge(server, tmp_path)(gray(0.4), ["x"])
    file = next(tmp_path.rglob("*.json"))
    file.write_text("{")
    assert judge(server, tmp_path)(gray(0.4), ["x"]).tolist() == pytest.approx([0.4])
    assert json.loads(file.read_text())["score"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("answer", "grade"),
    [("7", 0.7), ("Grade: 8.5", 0.85), ("7/10", 0.7), ("10.", 1.0), ("none", None), ("11", None), ("-3", None)],
)
def test_grades(answer: str, grade: float | None) -> None:
    assert parse_grade(answer) == grade


@pytest.mark.parametrize("spec", ["judge", "judge:localhost#m", "judge:http://localhost", "judge:ftp://x#m"])
def test_wrong_endpoints_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="URL"):
        open_reward(spec)
