"""`/v1/images/edits` through OpenAI's client: image to image, masks, and uploads that are refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from serve_setup import make_service, open_image, pixels, running

from fewstep.inference.editing import encode_source
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams


@pytest.fixture(scope="module")
def server(tiny):
    with running(make_service(tiny)) as server:
        yield server


def png(size=(64, 64), mode="RGB", alpha=None):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if alpha is not None:
        image.putalpha(alpha)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def half_transparent():
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (32, 0, 64, 64))
    return png(alpha=alpha)


def edit(server, image=None, **options):
    return server.client.images.edit(image=("image.png", image or png()), prompt="a fox", **options)


def tensor(content):
    return pixels(Image.open(io.BytesIO(content))).permute(2, 0, 1)[None].float() / 255


def test_image_to_image_and_inpainting_equal_the_library(server, tiny):
    params = SamplingParams(seed=3, steps=4, strength=0.5)
    plain = edit(server, extra_body={"seed": 3, "steps": 4, "strength": 0.5})
    expected = generate(tiny, ["a fox"], params, None, encode_source(tiny, tensor(png())))
    assert torch.equal(pixels(open_image(plain.data[0].b64_json)), expected.images[0])
    masked = edit(
        server, mask=("mask.png", half_transparent()), n=2, extra_body={"seed": 3, "steps": 4, "strength": 0.5}
    )
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    expected = generate(tiny, ["a fox"], params, None, encode_source(tiny, tensor(png()), mask))
    assert torch.equal(pixels(open_image(masked.data[0].b64_json)), expected.images[0])
    assert masked.data[1].b64_json != masked.data[0].b64_json
    events = [event.type for event in edit(server, stream=True, partial_images=1, extra_body={"steps": 4})]
    assert events == ["image_edit.partial_image", "image_edit.completed"]


def test_the_image_is_resized_to_the_wanted_size(server):
    made = edit(server, png((100, 50)), size="64x32", extra_body={"steps": 1})
    assert open_image(made.data[0].b64_json).size == (64, 32)


def bomb():
    """A small PNG that declares 30,000 x 30,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + bytes(50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": b"no image"}, "image: cannot be read as PNG, JPEG, WEBP"),
        ({"image": bomb()}, "image: "),
        ({"image": png()[:200]}, "image: cannot be read as"),
        ({"image": png((100, 50))}, "size: 100x50: both sides must be multiples of 16"),
        ({"size": "65536x65536"}, "size: 65536x65536 has more than 16384 pixels"),
        ({"mask": ("mask.png", png((32, 32)))}, "mask: 32x32, but the image is 64x64"),
        ({"extra_body": {"strength": 0}}, "strength: Input should be greater than 0"),
        ({"extra_body": {"steps": "few"}}, "steps: Input should be a valid integer"),
        ({"extra_body": {"steps": "auto"}}, "steps: auto; an edit needs a number of steps"),
        ({"extra_body": {"path": "/etc/passwd"}}, "path: there is no such field"),
    ],
)
def test_bad_uploads_are_one_line(server, options, message):
    with pytest.raises(openai.BadRequestError) as failed:
        edit(server, **options)
    assert message in failed.value.body["message"]
    assert "\n" not in failed.value.body["message"]
