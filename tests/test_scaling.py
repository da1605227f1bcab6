"""The formulas of docs/scaling.md, held to what two real processes hold and receive."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.models.pipeline import load
from fewstep.training.scaling import Calls, Layout, Size, calls, memory, traffic


@pytest.fixture(scope="module")
def size(tiny_folder: Path) -> Size:
    return Size.of(load(tiny_folder).transformer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_hold_and_receive_what_the_formulas_say(
    tiny_folder: Path, tmp_path: Path, size: Size, precision: str
) -> None:
    probe = Path(__file__).with_name("measure_shards.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(probe)]
    done = subprocess.run(
        [*launch, str(tiny_folder), precision, str(tmp_path / "found.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    layout, wanted = Layout(2, 2), calls(steps=1, fake_updates=2)
    held, sent = memory(size, layout), traffic(size, layout, wanted, bf16=precision == "bf16")
    for what in ("teacher", "student", "fake", "gradients", "AdamW", "moving average"):
        assert found[what] == pytest.approx(held[what], rel=0.02), what  # rows that two cannot divide are filled up
    assert found["weights received"] == pytest.approx(sent["weights"], rel=0.02)
    assert found["gradients received"] == pytest.approx(sent["gradients within a group"], rel=0.02)


def test_one_process_holds_all_and_receives_nothing(size: Size) -> None:
    held = memory(size, Layout(1, 1))
    assert sum(held.values()) == 9 * 4 * size.parameters
    assert sum(traffic(size, Layout(1, 1), Calls(10, 5)).values()) == 0


def test_calls_of_a_step() -> None:
    assert calls(steps=1, fake_updates=1) == Calls(1 + 1 + 1 + 2, 2)
    assert calls(steps=4, fake_updates=5) == Calls(2.5 + 2 + 5 * 3.5, 6)


def test_groups_keep_traffic_between_them_small(size: Size) -> None:
    whole, groups = Layout(64, 64), Layout(64, 8)
    assert traffic(size, whole, Calls(1, 1))["gradients between groups"] == 0
    between = traffic(size, groups, Calls(1, 1))["gradients between groups"]
    assert between == pytest.approx(2 * 7 / 8 * 4 * size.parameters / 8)
