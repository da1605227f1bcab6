"""Two replicas of the bundled model on a local Ray: the images of `fewstep generate`, and a replica that is killed."""

from __future__ import annotations

import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import lora_files as made
import openai
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serve_setup import open_image, pixels

from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load
from fewstep.serve.fleet import NAME, FleetSettings, application, local_ray

pytestmark = pytest.mark.slow

MODEL = "micro-turbo"
SETTINGS = {"replicas": 2, "per_replica": 2, "max_queue": 6}


@pytest.fixture(scope="module")
def pipeline():
    return load(MODEL, "cpu")


@pytest.fixture(scope="module")
def lora(pipeline, tmp_path_factory):
    file = tmp_path_factory.mktemp("loras") / "character.safetensors"
    made.save(file, made.kohya(made.adapter_for(pipeline.transformer, seed=1)))
    return file


@pytest.fixture(scope="module")
def url(lora):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with local_ray("127.0.0.1", port, cpus=2, gpus=0):
        serve.run(application(FleetSettings(model=MODEL, lora_dir=str(lora.parent), **SETTINGS)), name=NAME)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


def image(client, seed, **options):
    extra = {"seed": seed, **options.pop("extra", {})}
    answer = client.images.generate(prompt=options.pop("prompt", "a fox"), extra_body=extra, **options)
    (one,) = answer.data
    assert one.seed == seed
    return pixels(open_image(one.b64_json))


def metric(url, name):
    """Its value by replica."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["replica"]: sample.value for sample in samples}


def images_drawn(url):
    return metric(url, "fewstep_images_total")


def test_images_are_those_of_generate(client, url, pipeline):
    (expected,) = generate(pipeline, ["a fox"], SamplingParams(seed=5)).images
    assert torch.equal(image(client, 5), expected)
    events = list(client.images.generate(prompt="a fox", stream=True, partial_images=2, extra_body={"seed": 5}))
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert torch.equal(pixels(open_image(events[-1].b64_json)), expected)
    assert len(images_drawn(url)) == 2
    with urllib.request.urlopen(url) as page:
        assert b"<html" in page.read()


def test_mistakes_are_answered_as_by_one_process(client):
    with pytest.raises(openai.BadRequestError, match="size: 60x64: both sides must be multiples of 16"):
        client.images.generate(prompt="a fox", size="60x64")


def test_an_image_with_a_url_can_be_had_from_the_gateway(client, url):
    made = client.images.generate(prompt="a fox", response_format="url", extra_body={"seed": 5}).data[0]
    assert made.b64_json is None
    assert made.url.startswith(f"{url}/images/")
    with urllib.request.urlopen(made.url) as answer:
        content = answer.read()
        assert answer.headers["content-type"] == "image/png"
    assert torch.equal(pixels(Image.open(io.BytesIO(content))), image(client, 5))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/images/other.png")


def test_one_key_gives_one_image(client):
    """A random seed is that of the request's key, so that a repeated request gives the same image."""
    keys = [{"Idempotency-Key": key} for key in ("one", "one", "two")]
    seeds = [client.images.generate(prompt="a fox", extra_headers=key).data[0].seed for key in keys]
    assert seeds[0] == seeds[1] != seeds[2]


def test_requests_of_a_lora_go_to_the_replica_that_has_it(client, url, lora):
    (expected,) = generate(load(MODEL, "cpu", loras={str(lora): 0.8}), ["a fox"], SamplingParams(seed=3)).images
    options = {"extra": {"lora": {"character": 0.8}}}
    assert torch.equal(image(client, 3, **options), expected)
    time.sleep(10)  # Ray Serve tells its routers
    before = images_drawn(url)
    for _ in range(6):
        assert torch.equal(image(client, 3, **options), expected)
    drawn = Counter(images_drawn(url)) - Counter(before)
    assert list(drawn.values()) == [6]


def test_a_client_that_disconnects_is_forgotten(client, url):
    before = sum(images_drawn(url).values())
    extra = {"seed": 1, "steps": 100, "progress": True}
    with client.images.generate(prompt="a fox", stream=True, extra_body=extra) as stream:
        next(event for event in stream if event.type == "image_generation.progress")
    with ThreadPoolExecutor(4) as threads:  # two for each replica, behind the canceled one
        list(threads.map(lambda seed: image(client, seed), range(4)))
    assert sum(images_drawn(url).values()) == before + 4


def test_more_requests_than_the_queue_takes_are_refused(client):
    def attempt(seed):
        try:
            image(client, seed)
        except openai.RateLimitError as refused:
            return refused

    with ThreadPoolExecutor(20) as threads:
        refusals = [each for each in threads.map(attempt, range(20)) if each is not None]
    assert 0 < len(refusals) <= 20 - 10
    assert {each.code for each in refusals} == {"queue_full"}
    assert min(int(each.response.headers["retry-after"]) for each in refusals) >= 1


def test_a_killed_replica_loses_nothing(client, url, pipeline):
    """Each request gets its image, once, although it is drawn again where the replica was lost."""
    import ray

    params = [SamplingParams(seed=seed, steps=20) for seed in range(10)]
    expected = [generate(pipeline, ["a fox"], each).images[0] for each in params]
    began = threading.Event()

    def request(seed):
        if seed % 3:
            return image(client, seed, extra={"steps": 20})
        extra = {"seed": seed, "steps": 20}
        events = []
        for event in client.images.generate(prompt="a fox", stream=True, partial_images=2, extra_body=extra):
            began.set()
            events.append((event.type.partition(".")[2], event.b64_json))
        assert [kind for kind, _ in events] == ["partial_image", "partial_image", "completed"]
        return pixels(open_image(events[-1][1]))

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(request, seed) for seed in range(10)]
        began.wait(600)
        actors = ray.util.list_named_actors(all_namespaces=True)
        victim = next(actor for actor in actors if "#Replica#" in actor["name"])
        ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
        for seed, answer in enumerate(answers):
            assert torch.equal(answer.result(), expected[seed])
    assert metric(url, "fewstep_repeated_total")["gateway"] >= 1
    assert victim["name"].rpartition("#")[2] not in images_drawn(url)
