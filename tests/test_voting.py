"""Collecting votes: the order of the pairs, the record on disk, the requests of the page."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from voting import LABELS, PROMPTS, Client, serving, write_images

from fewstep.data.preferences import Candidate, preference_pairs, read_votes
from fewstep.errors import UserError
from fewstep.preferences.pool import candidates
from fewstep.preferences.schedule import schedule
from fewstep.preferences.server import VotingServer
from fewstep.preferences.vote_log import VoteLog

SIDES = (Candidate(model="a", image="a.png"), Candidate(model="b", image="b.png"))


def test_schedule_is_complete_and_balanced() -> None:
    labels = ["a", "b", "c", "d"]
    whole = schedule(labels, 24, seed=3)
    assert len({(each.prompt, frozenset((each.left, each.right))) for each in whole}) == len(whole) == 24 * 6
    for count in (24, 48, 96):  # whole rounds: each prompt equally often, and each pair of models
        part = whole[:count]
        assert schedule(labels, 24, seed=3, count=count) == part
        assert set(Counter(each.prompt for each in part).values()) == {count // 24}
        assert set(Counter(frozenset((each.left, each.right)) for each in part).values()) == {count // 6}
        assert set(Counter(side for each in part for side in (each.left, each.right)).values()) == {count // 2}
    left = Counter(each.left for each in whole)
    assert all(20 <= left[label] <= 52 for label in labels)  # 36 of 72 expected, 4 standard deviations
    assert [each.prompt for each in whole[:24]] != sorted(each.prompt for each in whole[:24])
    assert schedule(labels, 24, seed=4) != whole


def test_sides_do_not_depend_on_the_other_models() -> None:
    few, many = (
        {(each.prompt, each.left, each.right) for each in schedule(labels, 10, seed=0)} for labels in ("ab", "abc")
    )
    assert few < many


def test_votes_are_on_the_disk_and_numbered_on(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    with VoteLog(file) as log:
        assert not file.exists()
        log.add("one", *SIDES, "left", "human")
        assert [vote.prompt for vote in read_votes(file)] == ["one"]
        log.undo(1, "human")
    before = file.read_bytes()
    with VoteLog(file) as log:
        assert log.votes == {}
        assert log.add("two", *SIDES, "tie", "human").vote == 2
    assert file.read_bytes().startswith(before)  # nothing is rewritten
    assert [json.loads(line).keys() & {"vote", "undo"} for line in file.read_text().splitlines()] == [
        {"vote"}, {"undo"}, {"vote"},
    ]  # fmt: skip


@pytest.mark.parametrize(("cut", "kept"), [(10, 1), (1, 2)])
def test_a_line_that_was_cut_off_is_repaired(tmp_path: Path, cut: int, kept: int) -> None:
    """All but the line's end may be there; then it is a vote."""
    file = tmp_path / "votes.jsonl"
    with VoteLog(file) as log:
        log.add("one", *SIDES, "left", "human")
        log.add("二", *SIDES, "left", "human")
    file.write_bytes(file.read_bytes()[:-cut])
    with VoteLog(file) as log:
        assert len(log.votes) == kept
        log.add("three", *SIDES, "right", "human")
    assert [vote.vote for vote in read_votes(file)] == [*range(1, kept + 2)]


def test_a_vote_that_cannot_be_written_is_no_vote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "votes.jsonl"
    write_images(tmp_path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with serving(tmp_path) as (server, session):
        client = Client(server.server_port)
        state = client.state()
        client.post("/vote", pair=state["pair"], choice="left")
        before, state = file.read_bytes(), client.state()
        with monkeypatch.context() as patch:
            patch.setattr("fewstep.preferences.vote_log.os.fsync", full_disk)
            status, answer = client.post("/vote", pair=state["pair"], choice="left")
        assert status == 500
        assert answer == {"error": f"{file}: cannot be written (No space left on device); the vote is not recorded"}
        assert (file.read_bytes(), session.done) == (before, 1)
        assert client.post("/vote", pair=state["pair"], choice="left")[1]["done"] == 2  # the same pair, once more


def test_votes_through_requests(tmp_path: Path) -> None:
    write_images(tmp_path)
    comparisons = schedule(LABELS, len(PROMPTS), 0)
    with serving(tmp_path, comparisons) as (server, session):
        client = Client(server.server_port)
        state = client.state()
        assert state["total"] == len(PROMPTS)
        for done, (comparison, choice) in enumerate(zip(comparisons, ("left", "right", "tie"), strict=False)):
            assert (state["done"], state["prompt"]) == (done, PROMPTS[comparison.prompt])
            for name, side in zip(state["images"], candidates(comparison), strict=True):
                status, headers, content = client("GET", f"/image/{name}")
                assert (status, headers["Content-Type"]) == (200, "image/png")
                assert content == (tmp_path / side.image).read_bytes()
            status, state = client.post("/vote", pair=state["pair"], choice=choice)
            assert status == 200
            assert len(read_votes(tmp_path)) == done + 1  # before the next pair is shown
        votes = read_votes(tmp_path)
        assert [vote.choice for vote in votes] == ["left", "right", "tie"]
        assert [(vote.left, vote.right) for vote in votes] == [candidates(each) for each in comparisons[:3]]
        assert len(preference_pairs(tmp_path)) == 2

        _, state = client.post("/undo")
        _, state = client.post("/undo")
        assert (state["done"], state["prompt"]) == (1, PROMPTS[comparisons[1].prompt])
        assert [vote.vote for vote in read_votes(tmp_path)] == [1]
        while state["pair"] is not None:
            _, state = client.post("/vote", pair=state["pair"], choice="left")
        assert (state["done"], state["images"], state["can_undo"]) == (4, [], True)
        assert session.pending() == []


def test_votes_continue(tmp_path: Path) -> None:
    write_images(tmp_path)
    with serving(tmp_path) as (server, _):
        client = Client(server.server_port)
        client.post("/vote", pair=client.state()["pair"], choice="left")
        client.post("/vote", pair=client.state()["pair"], choice="left")
    with serving(tmp_path) as (server, session):
        client = Client(server.server_port)
        assert client.state()["done"] == 2
        _, state = client.post("/undo")  # of a vote from before
        assert state["done"] == session.done == 1
    with serving(tmp_path, voter="human:other") as (server, _):
        state = Client(server.server_port).state()
        assert (state["done"], state["can_undo"]) == (0, False)  # nobody undoes the votes of another


def test_nothing_that_is_received_names_a_model(tmp_path: Path) -> None:
    write_images(tmp_path)
    reds = []
    with serving(tmp_path, schedule(LABELS, len(PROMPTS), seed=1)) as (server, _):
        client = Client(server.server_port)
        client("GET", "/")
        state, names = client.state(), set()
        while state["pair"] is not None:
            contents = [client("GET", f"/image/{name}")[2] for name in state["images"]]
            with Image.open(io.BytesIO(contents[0])) as image:
                assert image.info == {}
                reds.append(image.getpixel((0, 0))[0])  # type: ignore[index]
            names |= {state["pair"], *state["images"]}
            _, state = client.post("/vote", pair=state["pair"], choice="tie")
            _, state = client.post("/undo")
            names |= {state["pair"], *state["images"]}
            _, state = client.post("/vote", pair=state["pair"], choice="tie")
        client("GET", "/image/../votes.jsonl")
        client("GET", "/images/teacher-model/0000.png")
        received = client.received.replace(b"/images/teacher-model/0000.png", b"")  # the path of this request
    assert [word for word in (*LABELS, "0000", str(tmp_path), "left.png") if word.encode() in received] == []
    assert len(names) == 6 * len(PROMPTS)  # a pair that is shown again has other names
    assert len(set(reds)) == 2, "the same model is always at the left"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/image/none", None, {}, 404),
        ("GET", "/", None, {"Host": "evil.example"}, 403),
        ("GET", "/state", None, {"Host": "[::1"}, 403),
        ("POST", "/vote", b"{}", {"Content_Type": "application/json", "Origin": "https://evil.example"}, 403),
        ("POST", "/undo", b"{}", {"Content_Type": "application/json", "Origin": "null"}, 403),
        ("POST", "/undo", b"{}", {"Content_Type": "text/plain"}, 400),
        ("POST", "/undo", b"{", {"Content_Type": "application/json"}, 400),
        ("POST", "/undo", b"[]", {"Content_Type": "application/json"}, 400),
        ("POST", "/undo", b" " * 5000, {"Content_Type": "application/json"}, 400),
        ("POST", "/other", b"{}", {"Content_Type": "application/json"}, 404),
        ("POST", "/vote", b"{}", {"Content_Type": "application/json"}, 400),
        ("POST", "/vote", b'{"pair": "x", "choice": "both"}', {"Content_Type": "application/json"}, 400),
        ("POST", "/vote", b'{"pair": "x", "choice": "left"}', {"Content_Type": "application/json"}, 409),
        ("POST", "/undo", b"{}", {"Content_Type": "application/json", "Host": "localhost:9"}, 200),
        ("DELETE", "/vote", None, {}, 501),
    ],
)
def test_other_requests(
    tmp_path: Path, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    write_images(tmp_path)
    with serving(tmp_path) as (server, session):
        client = Client(server.server_port)
        assert client(method, path, body, **headers)[0] == status
        assert (session.done, client.state()["done"]) == (0, 0)
        assert not (tmp_path / "votes.jsonl").exists()


def test_the_second_of_two_votes_on_a_pair_does_not_count(tmp_path: Path) -> None:
    """A key pressed twice, or a second window."""
    write_images(tmp_path)
    with serving(tmp_path) as (server, session):
        client = Client(server.server_port)
        pair = client.state()["pair"]
        assert client.post("/vote", pair=pair, choice="left")[0] == 200
        status, state = client.post("/vote", pair=pair, choice="right")
        assert (status, state["done"], session.done) == (409, 1, 1)
        assert [vote.choice for vote in read_votes(tmp_path)] == ["left"]


def test_a_missing_image_is_not_named_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path)
    with serving(tmp_path) as (server, _):
        client = Client(server.server_port)
        name = client.state()["images"][0]
        for file in tmp_path.glob("images/*/*.png"):
            file.unlink()
        status, _, content = client("GET", f"/image/{name}")
    assert (status, json.loads(content)) == (500, {"error": "the image cannot be read; see the terminal"})
    assert "-model/" in capsys.readouterr().err


def test_a_port_in_use_is_one_line() -> None:
    with (
        VotingServer(0) as server,
        pytest.raises(UserError, match=r"^--port \d+: Address already in use"),
    ):
        VotingServer(server.server_port)


def test_the_page_is_for_this_machine_alone() -> None:
    with VotingServer(0) as server:
        assert server.server_address[0] == "127.0.0.1"
