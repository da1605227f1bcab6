"""Records of votes: reading, undoing, bad lines, and the preference pairs that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.data.preferences import PreferencePair, preference_pairs, read_votes
from fewstep.errors import UserError


def vote(number: int, choice: str, prompt: str = "a fox", **more: Any) -> dict[str, Any]:
    sides = {side: {"model": side[0], "image": f"images/{side[0]}/0000.png"} for side in ("left", "right")}
    return {"vote": number, "prompt": prompt, **sides, "choice": choice, **more}


def write(folder: Path, *records: dict[str, Any], end: str = "") -> Path:
    for name in "lr":
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "images" / name / "0000.png")
    file = folder / "votes.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + end, encoding="utf-8")
    return file


def test_pairs_follow_the_choices(tmp_path: Path) -> None:
    write(tmp_path, vote(1, "left"), vote(2, "right", "two foxes"), vote(3, "tie", "three"))
    left, right = tmp_path / "images/l/0000.png", tmp_path / "images/r/0000.png"
    expected = [PreferencePair("a fox", left, right), PreferencePair("two foxes", right, left)]
    assert preference_pairs(tmp_path) == expected
    assert preference_pairs(tmp_path / "votes.jsonl") == expected


def test_undone_votes_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, vote(1, "left"), vote(2, "left"), {"undo": 2}, vote(3, "right"), {"undo": 1})
    assert [(each.vote, each.choice) for each in read_votes(tmp_path)] == [(3, "right")]


def test_votes_of_one_voter(tmp_path: Path) -> None:
    write(tmp_path, vote(1, "left"), vote(2, "right", voter="clip"))
    assert [each.vote for each in read_votes(tmp_path)] == [1, 2]
    assert [each.vote for each in read_votes(tmp_path, "clip")] == [2]
    with pytest.raises(UserError, match="no votes of me; there are votes of: human, clip"):
        read_votes(tmp_path, "me")


def test_a_moved_folder_has_the_same_pairs(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", vote(1, "left"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert preference_pairs(tmp_path / "new")[0].winner == tmp_path / "new/images/l/0000.png"


@pytest.mark.parametrize("end", ['{"vote": 2, "pro', '{"vote": 2, "prompt": "日'.encode()[:-1].decode("latin-1"), "{"])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path, end: str) -> None:
    write(tmp_path, vote(1, "left"), end=end)
    assert [each.vote for each in read_votes(tmp_path)] == [1]


def test_a_last_line_without_an_end_counts(tmp_path: Path) -> None:
    write(tmp_path, vote(1, "left"), end=json.dumps(vote(2, "right")))
    assert [each.vote for each in read_votes(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"vote": 2}, "prompt is missing"),
        (vote(2, "both"), "choice: input should be 'left', 'right' or 'tie'"),
        (vote(1, "left"), "a second vote 1"),
        (vote(0, "left"), "vote: input should be greater than or equal to 1"),
        (vote(2, "left", extra=1), "unknown key extra"),
        ({"undo": 5}, "undo 5: no vote before it"),
        ({"undo": True}, "undo: expected a number"),
        ({"choice": "left"}, "expected an object with the key vote or undo"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, record: dict[str, Any], problem: str) -> None:
    file = write(tmp_path, vote(1, "left"), record, vote(3, "left"))
    with pytest.raises(UserError, match=r"votes\.jsonl, line 2: ") as raised:
        read_votes(file)
    assert problem in str(raised.value)


def test_a_bad_line_inside_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, vote(1, "left"), end="{oops\n" + json.dumps(vote(2, "left")) + "\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_votes(file)


def test_undoing_twice_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, vote(1, "left"), {"undo": 1}, {"undo": 1})
    with pytest.raises(UserError, match="line 3: undo 1"):
        read_votes(file)


def test_missing_images_and_votes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; votes come from fewstep prefs collect"):
        read_votes(tmp_path)
    write(tmp_path, vote(1, "tie"))
    with pytest.raises(UserError, match="all votes are ties"):
        preference_pairs(tmp_path)
    write(tmp_path, vote(1, "left"))
    (tmp_path / "images/r/0000.png").unlink()
    with pytest.raises(UserError, match=r"vote 1: its image .*r/0000\.png is missing"):
        preference_pairs(tmp_path)
    write(tmp_path)
    with pytest.raises(UserError, match="no votes in it"):
        read_votes(tmp_path)
