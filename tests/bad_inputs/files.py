"""Files for the bad inputs: recipes to change, and ways to damage the model ``tiny``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DISTILL = """\
kind: distill
name: mine
teacher: tiny
method: {name: dmd, terms: {cfg_augmentation: {}, distribution_matching: {}}}
optim: {student: {lr: 0.01}, fake_score: {lr: 0.02}}
train: {steps: 1, batch_size: 2}
prompts: {source: prompts.txt}
evaluate: {enabled: false}
"""
CACHE = """\
kind: cache_trajectories
name: mine
teacher: tiny
prompts: {source: prompts.txt}
num_trajectories: 4
"""
STAGES = """\
kind: stages
name: mine
teacher: tiny
evaluate: {enabled: false}
stages:
"""
PROMPTS = "a fox\na bear\na cat\n"

TRANSFORMER = "tiny/transformer/diffusion_pytorch_model.safetensors"


def folder(path: Path) -> None:
    path.mkdir(parents=True)


def link_loop(path: Path) -> None:
    """A file that nobody can read, not even root."""
    os.symlink(path.name, path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def deleted(path: Path) -> None:
    path.unlink()


def json_with(**values: Any) -> Callable[[Path], None]:
    """A JSON file with some values changed."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change
