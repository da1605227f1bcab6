"""`fewstep generate --image`, `--mask` and `--vae`, and making such an image again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_generate_cli import assert_one_error, run

from fewstep.emoji.train_vae import build_vae
from fewstep.inference.editing import encode_source
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def succeed(*words):
    done = run("generate", *words)
    assert done.exit_code == 0, done.output
    return done


def read(file):
    return torch.from_numpy(np.array(Image.open(file)))


def tensor(file):
    return read(file).permute(2, 0, 1)[None].float() / 255


def test_image_to_image_is_that_of_the_library(tiny, tiny_folder, photo, tmp_path):
    words = (tiny_folder, "a fox", "a bear", "--image", photo, "--seed", 3, "--steps", 4, "-o", f"{tmp_path}/many/")
    assert ", NFE 4, " in succeed(*words, "--strength", 0.5).stdout
    params = SamplingParams(seed=3, steps=4, strength=0.5, width=64, height=32)
    source = encode_source(tiny, tensor(photo)).repeat(2)
    expected = generate(tiny, ["a fox", "a bear"], params, None, source).images
    for index in (0, 1):
        assert torch.equal(read(tmp_path / "many" / f"{index:04d}.png"), expected[index])
    assert "2 of them were made earlier" in succeed(*words, "--strength", 0.5).stdout
    assert_one_error(run("generate", *words, "--strength", 0.8), "other strength")
    Image.new("RGB", (64, 32)).save(photo)
    assert_one_error(run("generate", *words, "--strength", 0.5), "other image")


def test_masks_by_transparency_and_by_light(tiny, tiny_folder, photo, tmp_path):
    light = Image.new("L", (64, 32))
    light.paste(255, (32, 0, 64, 32))
    light.save(tmp_path / "light.png")
    clear = Image.new("RGBA", (64, 32), (0, 0, 0, 255))
    clear.paste((9, 9, 9, 0), (32, 0, 64, 32))
    clear.save(tmp_path / "clear.png")
    for name in ("light", "clear"):
        words = ("--image", photo, "--mask", tmp_path / f"{name}.png", "--steps", 3)
        succeed(tiny_folder, "a fox", *words, "-o", tmp_path / f"by-{name}.png")
    assert torch.equal(read(tmp_path / "by-light.png"), read(tmp_path / "by-clear.png"))
    mask = torch.zeros(1, 1, 32, 64)
    mask[..., 32:] = 1
    params = SamplingParams(steps=3, strength=0.8, width=64, height=32)
    expected = generate(tiny, ["a fox"], params, None, encode_source(tiny, tensor(photo), mask)).images[0]
    assert torch.equal(read(tmp_path / "by-light.png"), expected)


def test_an_edit_is_made_again_while_its_image_is_there(tiny_folder, photo, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    succeed(tiny_folder, "a fox", "--image", photo, "--steps", 3, "--width", 32, "--height", 32, "-o", one)
    succeed("--from", one, "-o", two)
    assert one.read_bytes() == two.read_bytes()
    moved = shutil.move(photo, tmp_path / "moved.png")
    assert_one_error(run("generate", "--from", one, "-o", two), "which is not there or has changed; give --image FILE")
    succeed("--from", one, "--image", moved, "-o", two)
    assert torch.equal(read(one), read(two))


def test_another_vae(tiny_folder, tmp_path):
    torch.manual_seed(5)
    other = tmp_path / "other"
    build_vae([8, 8, 16, 16], 1, 16, 4).save_pretrained(other)
    plain, image, again = (tmp_path / f"{name}.png" for name in ("plain", "image", "again"))
    words = (tiny_folder, "a fox", "--steps", 1)
    succeed(*words, "-o", plain)
    succeed(*words, "--vae", other, "-o", image)
    pipeline = load(tiny_folder, "cpu", vae=other)
    assert torch.equal(read(image), generate(pipeline, ["a fox"], SamplingParams(steps=1)).images[0])
    assert not torch.equal(read(image), read(plain))
    succeed("--from", image, "-o", again)
    assert again.read_bytes() == image.read_bytes()
    succeed(*words, "--vae", tiny_folder, "-o", again)  # a model's folder stands for its VAE
    assert torch.equal(read(again), read(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 4}, "latent_channels is 4, that of the model's own VAE 16"),
        ({"scaling_factor": 0.18215}, "scaling_factor is 0.18215, that of the model's own VAE"),
        ({"shift_factor": None}, "shift_factor is None, that of the model's own VAE"),
        ({"_class_name": "AutoencoderKLWan"}, "_class_name is AutoencoderKLWan"),
    ],
)
def test_a_vae_of_other_latents_is_refused(tiny_folder, tmp_path, change, message):
    other = shutil.copytree(tiny_folder / "vae", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    assert_one_error(run("generate", tiny_folder, "a fox", "--vae", other, "-o", tmp_path / "a.png"), other, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strength", 0.5), "--strength: an edit begins from an image; give --image FILE"),
        (("--mask", "photo.png"), "--mask: an edit begins from an image"),
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--image", "{photo}", "--mask", "{small}"), "16x16, but the image is 64x32"),
        (("--image", "{photo}", "--width", 40), "width 40 is not a multiple of 16"),
        (("--image", "{photo}", "--strength", 2), "strength: input should be less than or equal to 1 (got 2.0)"),
        (("--image", "{text}"), "cannot be read as PNG, JPEG, WEBP"),
        (("--vae", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_mistakes(tiny_folder, photo, tmp_path, words, message):
    Image.new("L", (16, 16)).save(tmp_path / "small.png")
    (tmp_path / "text.txt").write_text("no image")
    named = {"photo": photo, "small": tmp_path / "small.png", "text": tmp_path / "text.txt"}
    words = [word.format(**named) if isinstance(word, str) else word for word in words]
    assert_one_error(run("generate", tiny_folder, "a fox", *words, "-o", tmp_path / "a.png"), message)
