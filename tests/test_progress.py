"""Progress in a log: lines with counts, rates and the time left."""

import pytest

from fewstep import progress


def test_training_lines_appear_at_their_cadence(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.training_display("run", 0, 12, log_every=1, meanings={"a": "falls", "b": ""}) as display:
        for step in range(1, 13):
            display.update(step, {"student": 0.5})
    meaning, *lines = capsys.readouterr().err.splitlines()
    assert meaning == "loss a: falls"
    assert [line.split()[2] for line in lines] == ["5/12", "10/12", "12/12"]
    assert all(line.endswith("student 0.5") for line in lines)


def test_bars_write_lines_to_a_log_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    with progress.ProgressBars() as bars:
        images, texts = bars.add("images", 200), bars.add("texts")
        for _ in range(4):
            now += 20.0
            images(10)
            texts(1000)
    assert capsys.readouterr().err.splitlines() == [
        "images  20/200  0.5/s", "texts  2,000  50.0/s", "images  40/200  0.5/s", "texts  4,000  50.0/s",
    ]  # fmt: skip


def test_track_gives_every_item() -> None:
    assert list(progress.track(range(3), "numbers")) == [0, 1, 2]
