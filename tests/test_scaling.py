"""The formulas of docs/guides/distributed-training.md against the memory and traffic of two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.models.pipeline import load
from fewstep.plan.communication import ForwardCounts, ParamCounts, ShardingLayout, communication, forward_counts, memory


@pytest.fixture(scope="module")
def size(tiny_folder: Path) -> ParamCounts:
    return ParamCounts.of(load(tiny_folder).denoiser)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_hold_and_receive_the_bytes_of_the_formulas(
    tiny_folder: Path, tmp_path: Path, size: ParamCounts, precision: str
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
    layout, counts = ShardingLayout(2, 2), forward_counts(steps=1, fake_score_updates=2)
    held, sent = memory(size, layout), communication(size, layout, counts, bf16=precision == "bf16")
    for name in ("teacher", "student", "fake score", "gradients", "AdamW", "EMA"):
        assert found[name] == pytest.approx(held[name], rel=0.02), (
            name
        )  # rows that two processes cannot divide are padded
    assert found["weights received"] == pytest.approx(sent["weights"], rel=0.02)
    assert found["gradients received"] == pytest.approx(sent["gradients within a group"], rel=0.02)


def test_one_process_holds_everything_and_receives_nothing(size: ParamCounts) -> None:
    held = memory(size, ShardingLayout(1, 1))
    assert sum(held.values()) == 9 * 4 * size.parameters
    assert sum(communication(size, ShardingLayout(1, 1), ForwardCounts(10, 5)).values()) == 0


def test_passes_of_a_step() -> None:
    assert forward_counts(steps=1, fake_score_updates=1) == ForwardCounts(1 + 1 + 1 + 2, 2)
    assert forward_counts(steps=4, fake_score_updates=5) == ForwardCounts(2.5 + 2 + 5 * 3.5, 6)


def test_traffic_between_groups_is_an_all_reduce_of_shards(size: ParamCounts) -> None:
    whole, groups = ShardingLayout(64, 64), ShardingLayout(64, 8)
    assert communication(size, whole, ForwardCounts(1, 1))["gradients between groups"] == 0
    between = communication(size, groups, ForwardCounts(1, 1))["gradients between groups"]
    assert between == pytest.approx(2 * 7 / 8 * 4 * size.parameters / 8)
