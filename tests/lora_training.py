"""A small training set, and a few-step model to train a LoRA on."""

import json

import pytest
import torch
from pictures import picture

from fewstep.config.load import load_recipe
from fewstep.data.training_set.prepare import PrepareSettings, prepare
from fewstep.lora_job import train_lora
from fewstep.training.run_dir import RunDir

CPU = torch.device("cpu")
SHORT = [
    *("models.frozen_dtype=fp32", "train.precision=fp32", "train.batch_size=2", "train.log_every=1"),
    *("train.save_every=2", "train.sample_every=0", "adapter.rank=3", "adapter.alpha=6", "adapter.save_dtype=fp32"),
    *("data.preservation=null", "timesteps.distribution=sigmoid", "models.compile=false"),
    "optim.lora={lr: 0.02, ema_decay: 0.5}",
]


@pytest.fixture(scope="session")
def image_set(tmp_path_factory):
    """Five images: three wide ones and two squares, with captions."""
    root = tmp_path_factory.mktemp("sets")
    (root / "photos").mkdir()
    for number, size in enumerate([(192, 96), (64, 64), (192, 96), (192, 96), (64, 64)]):
        picture(number, size).save(root / "photos" / f"{number}.png")
        (root / "photos" / f"{number}.txt").write_text(f"a picture of {number}")
    prepare(root / "photos", root / "set", PrepareSettings(side=64))
    return root / "set"


@pytest.fixture(scope="session")
def few_step(tiny_folder, tmp_path_factory):
    """The tiny model as a 2-step one."""
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("students") / "student")
    config = json.loads((folder / "fewstep.json").read_text())
    config |= {"steps": 2, "guidance_scale": 0.0, "guidance_distilled": True, "sigmas": None}
    (folder / "fewstep.json").write_text(json.dumps(config))
    return folder


def run_lora(out, *overrides, recipe="micro-lora"):
    """Train in the folder ``out``; returns the LoRA file."""
    resolved = load_recipe(recipe, [*SHORT, *map(str, overrides)])
    with RunDir(out, resolved) as run:
        return train_lora(resolved, run, CPU)
