"""A server of a model that edits by instruction: `/v1/images/edits` equals the library, and what it refuses."""

from __future__ import annotations

import base64
import io

import openai
import pytest
import torch
from omni_setup import save_omni
from serve_setup import make_service, open_image, pixels, running
from test_instruction import noise_image

from fewstep.inference.image_metadata import ImageMetadata
from fewstep.inference.instruction import edit_images
from fewstep.inference.params import SamplingParams
from fewstep.models.editor import load_editor
from fewstep.models.generation_config import GenerationConfig
from fewstep.outputs import read_image_text


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    folder = save_omni(tmp_path_factory.mktemp("models") / "omni")
    (folder / "fewstep.json").write_text(GenerationConfig(steps=2, guidance_scale=1, height=64, width=64).dump(folder))
    return load_editor(folder, "cpu")


@pytest.fixture(scope="module")
def server(editor):
    with running(make_service(editor)) as server:
        yield server


def png(seed=0, size=(100, 70)):
    buffer = io.BytesIO()
    noise_image(seed, *size).save(buffer, "PNG")
    return buffer.getvalue()


def edit(server, *images, **options):
    files = [("image.png", image) for image in images or [png()]]
    return server.client.images.edit(image=files[0] if len(files) == 1 else files, prompt="make it snow", **options)


def test_edits_equal_the_library(server, editor):
    made = edit(server, png(0), png(1, (64, 80)), n=2, extra_body={"seed": 3})
    images = [noise_image(0, 100, 70), noise_image(1, 64, 80)]
    expected = edit_images(editor, ["make it snow"] * 2, images, SamplingParams(seed=3)).images
    for answer, image in zip(made.data, expected, strict=True):
        assert torch.equal(pixels(open_image(answer.b64_json)), image)
    assert open_image(made.data[0].b64_json).size == (64, 80)
    options = {"size": "64x64", "extra_body": {"seed": 3, "steps": 1, "negative_prompt": "rain"}}
    params = SamplingParams(seed=3, steps=1, width=64, height=64, negative_prompt="rain")
    (expected,) = edit_images(editor, ["make it snow"], images[:1], params).images
    assert torch.equal(pixels(open_image(edit(server, png(0), **options).data[0].b64_json)), expected)


def test_streams_and_metadata(server, tmp_path):
    events = list(edit(server, stream=True, partial_images=1, extra_body={"seed": 5}))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert open_image(events[0].b64_json).size == open_image(events[1].b64_json).size == (96, 64)
    whole = edit(server, extra_body={"seed": 5}).data[0]
    assert whole.b64_json == events[1].b64_json
    (tmp_path / "made.png").write_bytes(base64.b64decode(whole.b64_json))
    made = ImageMetadata.model_validate_json(read_image_text(tmp_path / "made.png"))
    assert (made.prompt, made.params.seed, made.params.strength) == ("make it snow", 5, None)


def test_the_model_says_how_it_edits(server):
    (model,) = server.client.models.list().data
    assert model.edits == "by instruction"


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([b"no image"], {}, "image: cannot be read as PNG, JPEG, WEBP"),
        ([png(0, (32, 32))], {}, "image: Image too small"),
        ([png()] * 5, {}, "5 images to edit: give 1 to 4"),
        ([png()] * 9, {}, "the body is not a valid form"),
        ([], {"mask": ("mask.png", png())}, "mask: this model edits by instruction"),
        ([], {"extra_body": {"strength": 0.5}}, "strength: has no effect on an edit by instruction"),
        ([], {"size": "60x64"}, "size: 60x64: both sides must be multiples of 16"),
        ([], {"size": "256x256"}, "size: 256x256 has more than 16384 pixels"),
        ([], {"extra_body": {"lora": '{"ann": 1}'}}, "lora"),
        ([], {"extra_body": {"enhance": True}}, "enhance: this server has no language model"),
    ],
)
def test_bad_requests_are_one_line(server, images, options, message):
    with pytest.raises(openai.BadRequestError) as failed:
        edit(server, *images, **options)
    assert message in failed.value.body["message"]
    assert "\n" not in failed.value.body["message"]


def test_generations_are_refused(server):
    with pytest.raises(openai.BadRequestError, match="send them to /v1/images/edits"):
        server.client.images.generate(prompt="a fox")
