"""`fewstep generate`: its outputs, its options, and one line for every mistake."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from fewstep.cli.main import app
from fewstep.inference.image_metadata import read_metadata


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_one_error(done, *parts):
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "damaged")


def test_grid_or_folder_of_images(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\n一只狐狸\n", encoding="utf-8")
    out = tmp_path / "grid.png"
    done = run("generate", tiny_folder, "a bear", "--prompts-file", prompts, "-o", out, "--seed", 1, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert "3 images, NFE 4, " in done.stdout
    assert out.is_file()
    done = run("generate", tiny_folder, "a bear", "-o", tmp_path / "many", "--guidance-scale", 0, "--width", 32)
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in (tmp_path / "many").iterdir()) == ["0000.png", "generation.json"]


def test_options_for_speed_and_memory(tiny_folder, tmp_path):
    plain, other = tmp_path / "plain.png", tmp_path / "other.png"
    assert run("generate", tiny_folder, "a fox", "-o", plain).exit_code == 0
    for offload in ("model", "group"):
        done = run("generate", tiny_folder, "a fox", "-o", other, "--offload", offload, "--attention-backend", "native")
        assert done.exit_code == 0, done.output
        assert plain.read_bytes() == other.read_bytes()
    assert run("generate", tiny_folder, "a fox", "-o", other, "--vae-tiling").exit_code == 0
    assert run("generate", tiny_folder, "a fox", "-o", other, "--dtype", "bf16").exit_code == 0
    assert_one_error(run("generate", tiny_folder, "a fox", "-o", plain, "--attention-backend", "guess"), "guess")
    assert_one_error(run("generate", tiny_folder, "a fox", "-o", plain, "--attention-backend", "flash"), "flash")
    assert_one_error(run("generate", tiny_folder, "a fox", "-o", plain, "--dtype", "fp16"), "overflow")


def test_an_image_is_made_again_from_its_file(tiny_folder, tmp_path):
    many, again, changed = tmp_path / "many", tmp_path / "again.png", tmp_path / "changed.jpg"
    words = ("--steps", 2, "--seed", 2**64 - 1, "--sampler", "sde", "--width", 32, "--negative-prompt", "蓝色的狗")
    done = run("generate", tiny_folder, "a bear", "一只狐狸", "a fox " * 20, "-o", many, *words)
    assert done.exit_code == 0, done.output
    for index in (0, 1, 2):
        done = run("generate", "--from", many / f"{index:04d}.png", "-o", again)
        assert done.exit_code == 0, done.output
        assert again.read_bytes() == (many / f"{index:04d}.png").read_bytes()
    assert run("generate", "--from", again, tiny_folder, "--seed", 7, "-o", changed).exit_code == 0
    made = read_metadata(changed)
    assert made == read_metadata(again).model_copy(update={"params": made.params, "model": str(tiny_folder)})
    assert made.params == read_metadata(again).params.model_copy(update={"seed": 7})


def test_an_image_is_not_made_again_with_another_model(tiny_folder, damaged, tmp_path):
    image = tmp_path / "fox.png"
    assert run("generate", tiny_folder, "a fox", "--steps", 1, "-o", image).exit_code == 0
    config = damaged / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert_one_error(
        run("generate", damaged, "--from", image, "-o", tmp_path / "other.png"), damaged, "is not the model"
    )


def test_corrupt_weights(damaged, tmp_path):
    file = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    out = tmp_path / "out.png"
    out.write_text("mine")
    assert_one_error(run("generate", damaged, "a fox", "-o", out), damaged / "transformer", "damaged, or not")
    assert out.read_text() == "mine"  # an existing file is kept


def test_missing_component(damaged, tmp_path):
    shutil.rmtree(damaged / "vae")
    assert_one_error(run("generate", damaged, "a fox", "-o", tmp_path / "out.png"), damaged / "vae")


@pytest.mark.parametrize(("content", "key"), [('{"steps": 0}', "steps"), ('{"sampler": "renoise"}', "sampler")])
def test_wrong_generation_config(damaged, tmp_path, content, key):
    (damaged / "fewstep.json").write_text(content)
    assert_one_error(run("generate", damaged, "a fox", "-o", tmp_path / "out.png"), damaged / "fewstep.json", key)


def test_prompt_that_is_too_long(tiny_folder, tmp_path):
    assert_one_error(run("generate", tiny_folder, "fox " * 3000, "-o", tmp_path / "out.png"), "tokens, at most 512")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--height", 65), "height 65 is not a multiple of 16"),
        (("--sampler", "renoise"), "sampler: input should be 'euler' or 'sde'"),
    ],
)
def test_value_that_the_model_cannot_take(tiny_folder, tmp_path, words, message):
    assert_one_error(run("generate", tiny_folder, "a fox", "-o", tmp_path / "o.png", *words), message)
