"""A published student is an ordinary model folder that shares what it can with its teacher's."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.emoji.publish_student import link_shared_components
from fewstep.emoji.scorer import EmojiScorer
from fewstep.errors import UserError
from fewstep.models.components import BUNDLED_MODELS, resolve_model


def test_shared_components_are_links_beside_the_teacher(tiny_folder: Path, tmp_path: Path) -> None:
    teacher, student = (Path(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("teacher", "student"))
    assert link_shared_components(student, teacher) == ["scheduler", "text_encoder", "tokenizer", "vae"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in (teacher, student):
        folder.rename(moved / folder.name)
    images = [fewstep.generate(path, "a fox", steps=1).images for path in (moved / "student", tiny_folder)]
    assert torch.equal(*images)


def test_other_weights_than_the_teachers_are_not_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    teacher, student = (Path(shutil.copytree(tiny_folder, tmp_path / name)) for name in ("teacher", "student"))
    file = next((student / "vae").glob("*.safetensors"))
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"vae/.*: other weights than the teacher's"):
        link_shared_components(student, teacher)
    assert file.is_file()


def test_the_bundled_student_draws_in_four_steps_what_it_is_told() -> None:
    assert set(BUNDLED_MODELS) == {"micro", "micro-turbo"}
    assert (resolve_model("micro-turbo") / "vae").resolve() == (resolve_model("micro") / "vae").resolve()
    prompts = [
        f"a noto emoji of a {name} on a {color} background"
        for name, color in (("fox", "blue"), ("red apple", "yellow"), ("soccer ball", "green"), ("unicorn", "purple"))
    ]
    made = fewstep.generate("micro-turbo", prompts, seed=1)
    assert made.nfe == 4
    scores = EmojiScorer().score(made.images, prompts)
    assert scores["background_acc"].mean() == 1
    assert scores["object_acc"].nanmean() >= 0.5
