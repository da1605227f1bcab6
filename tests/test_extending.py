"""A method and a loss term, each added in one file, run through the program and nothing else is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

PLUGINS = Path(__file__).parent / "plugins"

ON_POLICY = """\
kind: distill
name: on-policy
teacher: TEACHER
student: {steps: 2}
method: {name: on_policy, guidance_scale: 1.5}
optim: {student: {lr: 1.0e-3}}
evaluate: {enabled: false}
train: {steps: 4, batch_size: 4, log_every: 1, save_every: 2}
"""


def fewstep(*words: object, plugin: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the program with one plug-in, in one process or several."""
    launcher = [sys.executable, "-m", "fewstep"]
    if processes > 1:
        launcher = [*launcher[:1], "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher += ["-m", "fewstep"]
    environment = {**os.environ, "FEWSTEP_PLUGINS": str(PLUGINS / plugin), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def weights(run: Path) -> dict[str, object]:
    return load_file(run / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "on-policy.yaml"
    file.write_text(ON_POLICY.replace("TEACHER", str(tiny_folder)), encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_method_in_one_file_trains_and_resumes(recipe: Path, tmp_path: Path) -> None:
    fewstep("distill", recipe, "--out", tmp_path / "whole", plugin="on_policy.py")
    fewstep("distill", recipe, "--out", tmp_path / "parts", "-s", "train.steps=2", plugin="on_policy.py")
    fewstep("distill", recipe, "--out", tmp_path / "parts", plugin="on_policy.py")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["student/mean_loss"] for line in lines] == [line["student/mean_loss"] for line in expected]


@pytest.mark.slow
def test_a_method_in_one_file_is_planned(recipe: Path) -> None:
    done = fewstep("plan", recipe, "--gpu", "24GB", plugin="on_policy.py")
    assert "saved activations" in done.stdout
    assert "24GB (24 GB): fits" in done.stdout


@pytest.mark.slow
def test_a_method_in_one_file_runs_in_two_processes(recipe: Path, tmp_path: Path) -> None:
    fewstep("distill", recipe, "--out", tmp_path / "one", plugin="on_policy.py")
    fewstep("distill", recipe, "--out", tmp_path / "two", plugin="on_policy.py", processes=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4  # type: ignore[operator]


@pytest.mark.slow
def test_a_loss_term_in_one_file_is_part_of_method_dmd(tiny_folder: Path, tmp_path: Path) -> None:
    terms = "method.terms={cfg_augmentation: {}, latent_norm: {weight: 0.5, target: 1.2}}"
    settings = ["train.steps=1", "train.batch_size=2", "train.log_every=1", "evaluate.enabled=false"]
    words = [word for setting in [f"teacher={tiny_folder}", terms, *settings] for word in ("-s", setting)]
    fewstep("distill", "micro-ca", "--out", tmp_path / "run", *words, plugin="latent_norm.py")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["student/latent_norm"] > 0
