"""`fewstep generate --edit`: images edited by instruction, on a Z-Image-Omni of random weights."""

from __future__ import annotations

import json
import shutil

import lora_files as made
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageOmniPipeline
from omni_setup import save_omni
from PIL import Image
from test_generate_cli import assert_one_error, run

from fewstep.errors import UserError
from fewstep.inference.generate import GenerationCancelled
from fewstep.inference.image_metadata import read_metadata
from fewstep.inference.instruction import edit_images
from fewstep.inference.params import SamplingParams
from fewstep.models.editor import load_editor
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.zimage.omni import OMNI

SIGMAS = [1.0, 0.8, 0.3, 0.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_omni(tmp_path_factory.mktemp("models") / "omni")


@pytest.fixture(scope="module")
def student(folder, tmp_path_factory):
    """The same weights with the sampling of a few-step student."""
    config = GenerationConfig(steps=3, sigmas=SIGMAS, guidance_distilled=True)
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "student")
    (copy / "fewstep.json").write_text(config.dump(copy))
    return copy


def noise_image(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photo(tmp_path):
    noise_image(0, 100, 70).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def diffusers_pipeline(folder, dtype=torch.float32):
    """diffusers' own call works with a VAE in bf16 alone."""
    pipeline = ZImageOmniPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.vae.to(torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(*words):
    done = run("generate", *words)
    assert done.exit_code == 0, done.output
    return done


def pixels(file):
    return np.array(Image.open(file))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_edits_are_those_of_diffusers_to_the_bit(folder, photo, tmp_path, dtype):
    noise_image(1, 64, 80).save(tmp_path / "other.png")
    words = ("--edit", photo, "--edit", tmp_path / "other.png", "--seed", 3, "--steps", 3, "--guidance-scale", 2)
    more = ("--negative-prompt", "blurry", "--cfg-truncation", 0.3, "--cfg-normalization", 1, "--dtype", dtype)
    prompts = ["make the sky pink", "让天空变成粉红色"]
    assert ", NFE 5, " in edit(folder, *prompts, *words, *more, "-o", f"{tmp_path}/out/").stdout
    theirs = diffusers_pipeline(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    images = [Image.open(photo), Image.open(tmp_path / "other.png")]
    for index, prompt in enumerate(prompts):
        expected = theirs(
            image=images, prompt=prompt, num_inference_steps=3, guidance_scale=2.0, negative_prompt="blurry",
            cfg_truncation=0.3, cfg_normalization=1.0, generator=torch.Generator().manual_seed(3 + index),
        ).images[0]  # fmt: skip
        assert expected.size == (64, 80)
        assert np.array(expected).std() > 10
        assert np.array_equal(pixels(tmp_path / "out" / f"{index:04d}.png"), np.array(expected))


def test_a_student_is_sampled_at_its_own_levels_without_guidance(student, photo, tmp_path):
    assert ", NFE 3, " in edit(student, "make the sky pink", "--edit", photo, "-o", tmp_path / "a.png").stdout
    theirs = diffusers_pipeline(student)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    options = {"guidance_scale": 0.0, "generator": torch.Generator().manual_seed(0)}
    expected = theirs(image=[Image.open(photo)], prompt="make the sky pink", sigmas=SIGMAS[:-1], **options).images[0]
    assert np.array_equal(pixels(tmp_path / "a.png"), np.array(expected))
    words = (student, "make the sky pink", "--edit", photo, "-o", tmp_path / "b.png")
    edit(*words, "--steps", 2)
    assert not np.array_equal(pixels(tmp_path / "b.png"), np.array(expected))
    assert_one_error(run("generate", *words, "--guidance-scale", 2), "this model has guidance distilled into it")


def test_steps_are_reported_with_predictions(student):
    editor, seen = load_editor(student, "cpu"), []
    images = [noise_image(0, 64, 64)]
    result = edit_images(editor, ["make the sky pink"], images, callback=seen.append)
    assert [(step.step, step.steps, step.finished) for step in seen] == [(1, 3, 0), (2, 3, 0), (3, 3, 1)]
    assert [step.sampler_step.sigma for step in seen] == SIGMAS[:-1]
    last = seen[-1].sampler_step
    torch.testing.assert_close(last.x0, last.x_next)
    assert result.images.shape == (1, 64, 64, 3)
    with pytest.raises(GenerationCancelled):
        edit_images(editor, ["make the sky pink"], images, callback=lambda step: False)


def test_an_edit_is_made_again_while_its_images_are_there(student, photo, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    edit(student, "make the sky pink", "--edit", photo, "--seed", 7, "-o", one)
    found = read_metadata(one)
    assert (found.prompt, found.params.seed, found.params.width, found.params.height) == (
        "make the sky pink",
        7,
        96,
        64,
    )
    edit("--from", one, "-o", two)
    assert one.read_bytes() == two.read_bytes()
    edit("--from", one, student, "make it snow", "-o", two)
    assert read_metadata(two).prompt == "make it snow"
    assert not np.array_equal(pixels(one), pixels(two))
    moved = shutil.move(photo, tmp_path / "moved.png")
    assert_one_error(run("generate", "--from", one, "-o", two), "not there or has changed; give --edit FILE for each")
    edit("--from", one, "--edit", moved, "-o", two)
    assert np.array_equal(pixels(one), pixels(two))


def test_lora_files_change_the_transformer_as_in_diffusers(student, photo, tmp_path):
    theirs = diffusers_pipeline(student)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    adapter = made.adapter_for(theirs.transformer, (*made.LAYERS, "siglip_refiner.0.attention.to_q"))
    made.save(tmp_path / "ann.safetensors", made.diffusers(adapter))
    words = (student, "make the sky pink", "--edit", photo)
    edit(*words, "-o", tmp_path / "without.png")
    assert "bound to 8 of" in edit(*words, "--lora", f"{tmp_path}/ann.safetensors", "-o", tmp_path / "with.png").stderr
    theirs.load_lora_weights(tmp_path / "ann.safetensors")
    options = {"guidance_scale": 0.0, "generator": torch.Generator().manual_seed(0)}
    expected = theirs(image=[Image.open(photo)], prompt="make the sky pink", sigmas=SIGMAS[:-1], **options).images[0]

    def difference(name):
        return np.abs(pixels(tmp_path / name).astype(float) - np.array(expected)).mean()

    # the sums differ by rounding in fp32, which single pixels of the VAE in bf16 show
    assert difference("with.png") < 1 < 5 < difference("without.png")
    edit("--from", tmp_path / "with.png", "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "with.png").read_bytes()


def test_each_image_and_their_order_count(student, photo, tmp_path):
    noise_image(1, 100, 70).save(tmp_path / "other.png")
    out, words = tmp_path / "a.png", (student, "make the sky pink", "-o")
    seen = []
    for names in (["photo"], ["other"], ["photo", "other"], ["other", "photo"]):
        edit(*words, out, *(word for name in names for word in ("--edit", tmp_path / f"{name}.png")))
        seen.append(out.read_bytes())
    assert len(set(seen)) == 4
    edit(*words, f"{tmp_path}/many/", "--edit", photo)
    other = run("generate", *words, f"{tmp_path}/many/", "--edit", tmp_path / "other.png")
    assert_one_error(other, "images of another generation (other references)")


def test_the_size_of_an_edit_is_that_of_its_last_image_up_to_a_megapixel():
    assert OMNI.default_size(Image.new("RGB", (100, 70)), 16) == (96, 64)
    assert OMNI.default_size(Image.new("RGB", (1024, 1024)), 16) == (1024, 1024)
    assert OMNI.default_size(Image.new("RGB", (2000, 1500)), 16) == (1168, 880)  # of 1182 x 886


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--edit", "nowhere.png"), "nowhere.png"),
        (("--edit", "{text}"), "cannot be read as PNG, JPEG, WEBP"),
        (("--edit", "{small}"), "small.png: Image too small: 32×32"),
        (("--edit", "{long}"), "long.png: Aspect ratio too extreme: 64×640"),
        (("--edit", "{photo}") * 5, "5 images to edit: give 1 to 4"),
        (("--edit", "{photo}", "--width", 40), "width 40 is not a multiple of 16"),
        (("--edit", "{photo}", "--width", 512), "512 x 64: this transformer has positions for sides of at most 256"),
        (("--edit", "{photo}", "--strength", 0.5), "--strength: has no effect with --edit"),
        (("--edit", "{photo}", "--image", "{photo}"), "--image: has no effect with --edit"),
        (("--edit", "{photo}", "--cache", "taylor"), "--cache: has no effect with --edit"),
        (("--edit", "{photo}", "--enhance"), "--enhance: has no effect with --edit"),
        (("--edit", "{photo}", "--offload", "model"), "--offload: has no effect with --edit"),
        (("--edit", "{photo}", "--sampler", "sde"), "sampler sde: edits by instruction are sampled with euler"),
        (("--edit", "{photo}", "--dtype", "fp8"), "fp8: weights of a model that edits by instruction"),
        (("--edit", "{photo}", "--dtype", "fp16"), "overflow"),
        (("--edit", "{photo}", "--negative-prompt", "sky " * 600), "at most 512 fit"),
        ((), "ZImageOmniPipeline edits images by instruction alone: fewstep generate with --edit FILE"),
    ],
)
def test_mistakes(student, photo, tmp_path, words, message):
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    Image.new("RGB", (64, 640)).save(tmp_path / "long.png")
    (tmp_path / "text.txt").write_text("no image")
    named = {name: tmp_path / name for name in ("photo.png", "small.png", "long.png", "text.txt")}
    named = {name.partition(".")[0]: path for name, path in named.items()}
    words = [word.format(**named) if isinstance(word, str) else word for word in words]
    assert_one_error(run("generate", student, "make it snow", *words, "-o", tmp_path / "a.png"), message)


def test_other_models_are_refused(tiny_folder, photo, tmp_path):
    done = run("generate", tiny_folder, "make it snow", "--edit", photo, "-o", tmp_path / "a.png")
    assert_one_error(done, f"{tiny_folder}: ZImagePipeline does not edit images by instruction")
    with pytest.raises(UserError, match="does not edit"):
        load_editor(tiny_folder, "cpu")


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"siglip_feat_dim": None}, "siglip_feat_dim null is not supported"),
        ("transformer", {"all_patch_size": [4]}, "all_patch_size [4] is not supported"),
        ("siglip", None, "siglip: no such folder; the model is incomplete"),
        ("vae", {"scaling_factor": None}, "scaling_factor in its config.json is None"),
        ("siglip_processor", {"patch_size": 8}, "its patches have 8 pixels, those of siglip 16"),
    ],
)
def test_damaged_models(student, photo, tmp_path, component, changes, message):
    damaged = shutil.copytree(student, tmp_path / "damaged")
    if changes is None:
        shutil.rmtree(damaged / component)
    else:
        name = "preprocessor_config.json" if component == "siglip_processor" else "config.json"
        config = json.loads((damaged / component / name).read_text())
        (damaged / component / name).write_text(json.dumps(config | changes))
    done = run("generate", damaged, "make it snow", "--edit", photo, "-o", tmp_path / "a.png")
    assert_one_error(done, damaged / component, message)


def test_features_of_another_width(photo, tmp_path):
    other = save_omni(tmp_path / "other", siglip_feat_dim=24)
    done = run("generate", other, "make it snow", "--edit", photo, "-o", tmp_path / "a.png")
    assert_one_error(done, other / "siglip", "its features have 16 numbers, the transformer takes 24")


def test_parameters_without_effect_are_errors(student):
    editor = load_editor(student, "cpu")
    for name, value in {"system_prompt": "Draw.", "strength": 0.5, "adapters": {"ann": 1.0}}.items():
        with pytest.raises(UserError, match=f"{name}: has no effect on an edit by instruction"):
            edit_images(editor, ["a fox"], [noise_image(0, 64, 64)], SamplingParams(**{name: value}))
    with pytest.raises(UserError, match="0 images to edit: give 1 to 4"):
        edit_images(editor, ["a fox"], [])
