"""A fleet of the bundled model on a local Ray that grows under load, and shrinks again."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from test_fleet import MODEL, image, images_drawn

from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import load
from fewstep.serve.fleet import NAME, FleetSettings, application, local_ray

pytestmark = pytest.mark.slow

SECONDS = 240  # for Ray Serve to change the number of replicas, on a busy machine
SEEDS = 4


@pytest.fixture(scope="module")
def url():
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = {"replicas": 1, "max_replicas": 2, "per_replica": 2, "max_queue": 20}
    with local_ray("127.0.0.1", port, cpus=2, gpus=0):
        fleet = FleetSettings(model=MODEL, upscale_delay=1, downscale_delay=5, **limits)
        serve.run(application(fleet), name=NAME)
        yield f"http://127.0.0.1:{port}"


def wait_for(found):
    end = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < end
        time.sleep(1)


def test_a_replica_is_added_under_load_and_stopped_after_it(url):
    """Six clients keep a queue until both replicas have drawn; all answers are the images of `fewstep generate`."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    model = load(MODEL, "cpu")
    params = [SamplingParams(seed=seed, steps=10) for seed in range(SEEDS)]
    expected = [generate(model, ["a fox"], each).images[0] for each in params]
    assert len(images_drawn(url)) == 1
    enough, seeds = threading.Event(), itertools.cycle(range(SEEDS))

    def request_until_enough():
        answers = []
        while not enough.is_set():
            seed = next(seeds)
            answers.append(torch.equal(image(client, seed, extra={"steps": 10}), expected[seed]))
        return answers

    with ThreadPoolExecutor(6) as threads:
        clients = [threads.submit(request_until_enough) for _ in range(6)]
        try:
            wait_for(lambda: len(images_drawn(url)) == 2 and min(images_drawn(url).values()) >= 4)
        finally:
            enough.set()
        answers = [right for each in clients for right in each.result()]
    assert len(answers) >= 8
    assert all(answers)
    wait_for(lambda: len(images_drawn(url)) == 1)
    assert torch.equal(image(client, 0, extra={"steps": 10}), expected[0])
