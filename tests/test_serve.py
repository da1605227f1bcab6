"""`fewstep serve` through OpenAI's client: images, formats, streams, errors."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serve_setup import make_service, open_image, pixels, running

from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams


@pytest.fixture(scope="module")
def server(tiny):
    with running(make_service(tiny)) as server:
        yield server


def drawn(tiny, prompt, seed, **options):
    """The image that `fewstep generate` draws."""
    return generate(tiny, [prompt], SamplingParams(seed=seed, **options)).images[0]


def test_images_are_those_of_generate(server, tiny):
    made = server.client.images.generate(
        prompt="a fox", n=2, size="32x64", extra_body={"seed": 5, "steps": 2, "negative_prompt": "a dog"}
    )
    assert [image.seed for image in made.data] == [5, 6]
    assert (made.size, made.output_format, made.steps) == ("32x64", "png", 2)
    for image in made.data:
        expected = drawn(tiny, "a fox", image.seed, steps=2, width=32, height=64, negative_prompt="a dog")
        assert torch.equal(pixels(open_image(image.b64_json)), expected)


def test_requests_at_the_same_time_get_their_own_images_to_the_bit(server, tiny):
    """They are drawn in batches, as the metrics show."""
    prompts = [f"a {animal}" for animal in ("fox", "bear " * 30, "cat", "狐狸", "dog", "owl")]
    with ThreadPoolExecutor(len(prompts)) as threads:
        made = list(threads.map(lambda p: server.images(p, extra={"seed": 9, "steps": 3}), prompts))
    for prompt, (image,) in zip(prompts, made, strict=True):
        assert torch.equal(pixels(image), drawn(tiny, prompt, 9, steps=3))
    assert 'fewstep_batch_images_bucket{le="1.0"}' in server.service.metrics.dump().decode()
    assert server.service.metrics.registry.get_sample_value("fewstep_batch_images_count") < (
        server.service.metrics.registry.get_sample_value("fewstep_images_total")
    )


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_output_formats(server, output_format):
    best = server.client.images.generate(
        prompt="a fox", output_format=output_format, extra_body={"seed": 1, "steps": 1}
    )
    small = server.client.images.generate(
        prompt="a fox", output_format=output_format, output_compression=10, extra_body={"seed": 1, "steps": 1}
    )
    assert open_image(best.data[0].b64_json).format == output_format.upper()
    assert len(small.data[0].b64_json) < len(best.data[0].b64_json)


def test_a_url_gives_the_image_with_its_settings(server, tmp_path):
    from fewstep.inference.image_metadata import read_metadata

    made = server.client.images.generate(prompt="a fox", response_format="url", extra_body={"seed": 3, "steps": 1})
    assert made.data[0].b64_json is None
    with urllib.request.urlopen(made.data[0].url) as answer:
        assert answer.headers["content-type"] == "image/png"
        (tmp_path / "fox.png").write_bytes(answer.read())
    metadata = read_metadata(tmp_path / "fox.png")
    assert (metadata.prompt, metadata.params.seed, metadata.params.steps, metadata.model) == ("a fox", 3, 1, "tiny")


def test_stream_of_partial_images(server, tiny):
    events = list(
        server.client.images.generate(prompt="a fox", stream=True, partial_images=2, extra_body={"seed": 4, "steps": 6})
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    final = pixels(open_image(events[-1].b64_json))
    assert torch.equal(final, drawn(tiny, "a fox", 4, steps=6))
    steps = []
    generate(tiny, ["a fox"], SamplingParams(seed=4, steps=6), steps.append)
    for event, step in zip(events[:2], (steps[1], steps[3]), strict=True):
        preview = (tiny.decode(step.x0)[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
        assert torch.equal(pixels(open_image(event.b64_json)), preview)


def test_progress_events_are_an_extension(server):
    events = list(
        server.client.images.generate(prompt="a fox", n=2, stream=True, extra_body={"steps": 3, "progress": True})
    )
    assert events[0].type == "image_generation.queued"
    assert (events[0].images_ahead, events[0].estimated_seconds > 0) == (0, True)
    steps = [(event.index, event.step) for event in events if event.type == "image_generation.progress"]
    assert sorted(steps) == [(index, step) for index in (0, 1) for step in (1, 2, 3)]
    assert [event.index for event in events if event.type == "image_generation.completed"] == [0, 1]


def test_random_seeds_differ_and_are_told(server):
    made = [server.client.images.generate(prompt="a fox", extra_body={"steps": 1}).data[0] for _ in range(2)]
    assert made[0].seed != made[1].seed
    assert made[0].b64_json != made[1].b64_json


def test_models_health_metrics_and_schema(server):
    (model,) = server.client.models.list().data
    assert (model.id, model.defaults["steps"], model.limits["multiple"]) == ("tiny", 6, 16)
    assert server.client.models.retrieve("tiny").id == "tiny"
    for path in ("health", "ready", "metrics", "openapi.json", "", "page.js", "page.css"):
        with urllib.request.urlopen(f"{server.url}/{path}") as answer:
            content = answer.read().decode()
        if path == "openapi.json":
            assert "/v1/images/generations" in json.loads(content)["paths"]
        if path == "metrics":
            assert 'fewstep_request_seconds_bucket{le="0.01",phase="queue"}' in content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "60x64"}, "size: 60x64: both sides must be multiples of 16"),
        ({"size": "4096x4096"}, "size: 4096x4096 has more than 16384 pixels"),
        ({"size": "big"}, "size: expected WIDTHxHEIGHT"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 11}, "n: Input should be less than or equal to 10"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": "x" * 4001}, "prompt: 4001 characters; at most 4000"),
        ({"prompt": "fox " * 900}, "tokens, at most 512 fit"),
        ({"response_format": "file"}, "response_format: Input should be 'url' or 'b64_json'"),
        ({"partial_images": 1}, "partial_images, progress: only with stream"),
        ({"quality": "hd"}, "quality: Input should be 'auto'"),
        ({"extra_body": {"seed": -1}}, "seed: Input should be greater than or equal to 0"),
        ({"extra_body": {"seed": True}}, "seed: expected a number, not true or false"),
        ({"extra_body": {"steps": 101}}, "steps: 101; at most 100"),
        ({"extra_body": {"sampler": "sde"}}, "sampler: there is no such field; there are prompt, model, n"),
    ],
)
def test_a_mistake_is_one_line_in_openais_form(server, options, message):
    with pytest.raises(openai.BadRequestError) as failed:
        server.client.images.generate(**{"prompt": "a fox", **options})
    assert message in failed.value.body["message"]
    assert failed.value.body["type"] == "invalid_request_error"


def test_another_model_and_another_page_are_not_found(server):
    with pytest.raises(openai.NotFoundError) as failed:
        server.client.images.generate(prompt="a fox", model="dall-e-3")
    assert failed.value.code == "model_not_found"
    for path in ("nothing", "images/nothing.png", "images/..%2f..%2fpyproject.toml", "..%2fapp.py", "v1/models/../x"):
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(f"{server.url}/{path}")
        assert failed.value.code == 404


def test_negative_prompts_are_refused_without_guidance(tiny):
    config = tiny.generation_config.model_copy(update={"guidance_scale": 0.0})
    with running(make_service(tiny.with_transformer(tiny.transformer, config))) as server:
        with pytest.raises(openai.BadRequestError, match="negative_prompt: this model has no guidance"):
            server.client.images.generate(prompt="a fox", extra_body={"negative_prompt": "a dog"})
        assert server.client.models.list().data[0].limits["negative_prompt"] is False
