"""`fewstep serve` under load and in trouble: full queue, disconnection, deadline, crash, memory, keys, SIGTERM."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from serve_setup import make_service, open_image, pixels, running, wait_for

from fewstep.errors import UserError
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.serve.settings import read_api_keys


class Gate:
    """Holds an engine's batches back until it opens, and records their sizes."""

    def __init__(self, service):
        self.open, self.batches, self.inside = threading.Event(), [], 0
        draw = service.engine.draw

        def held(jobs):
            self.inside += 1
            self.open.wait(60)
            self.batches.append([job.request.prompt for job in jobs])
            draw(jobs)

        service.engine.draw = held


@pytest.fixture
def gated(tiny):
    """A server whose engine is held, after its first image."""
    service = make_service(tiny, max_queue=4)
    with running(service) as server:
        server.gate = Gate(service)
        try:
            yield server
        finally:
            server.gate.open.set()


def later(server, prompt, **options):
    """A request in another thread."""
    pool = ThreadPoolExecutor(1)
    extra = {"steps": 1, "seed": 1, **options.pop("extra", {})}
    return pool.submit(lambda: server.client.images.generate(prompt=prompt, extra_body=extra, **options))


def queued(server, count):
    wait_for(lambda: server.service.scheduler.queued == count)


def test_a_full_queue_refuses_with_the_time_to_wait(gated):
    first = later(gated, "a fox")
    wait_for(lambda: gated.gate.inside == 1)
    waiting = [later(gated, f"a bear {index}", n=2) for index in range(2)]
    queued(gated, 4)
    with pytest.raises(openai.RateLimitError) as failed:
        gated.client.images.generate(prompt="a cat")
    assert failed.value.code == "queue_full"
    assert int(failed.value.response.headers["retry-after"]) >= 1
    gated.gate.open.set()
    assert [len(each.result().data) for each in [first, *waiting]] == [1, 2, 2]
    assert [sorted(prompts) for prompts in gated.gate.batches] == [["a fox"], ["a bear 0"] * 2 + ["a bear 1"] * 2]


def test_a_client_that_disconnects_is_forgotten(gated):
    first = later(gated, "a fox")
    wait_for(lambda: gated.gate.inside == 1)
    plain = post(gated.port, {"prompt": "a bear"})
    stream = post(gated.port, {"prompt": "a bear", "stream": True, "progress": True})
    assert b"200 OK" in stream.recv(1000)
    queued(gated, 2)
    plain.close()
    queued(gated, 1)
    stream.close()
    queued(gated, 0)
    gated.gate.open.set()
    first.result()
    assert gated.images("a cat", extra={"steps": 1})
    assert [prompts for prompts in gated.gate.batches if "a bear" in prompts] == []


def test_a_batch_that_nobody_waits_for_stops_at_its_next_step(tiny):
    service = make_service(tiny)
    with running(service) as server:
        stream = post(server.port, {"prompt": "a fox", "steps": 100, "stream": True, "progress": True})
        received = b""
        while b'"step": 2' not in received:
            received += stream.recv(1000)
        stream.close()
        assert server.images("a cat", extra={"steps": 1})
        assert service.metrics.registry.get_sample_value("fewstep_images_total") == 2  # the first, and the cat


def test_a_deadline_ends_a_request_and_no_other(tiny):
    service = make_service(tiny, timeout=1.0)
    with running(service) as server:
        gate = Gate(service)
        with pytest.raises(openai.APIStatusError) as failed:
            server.client.images.generate(prompt="a fox", extra_body={"steps": 1})
        assert (failed.value.status_code, failed.value.code) == (504, "timeout")
        gate.open.set()
        assert server.images("a cat", extra={"steps": 1})


def test_a_crash_is_the_answer_of_its_batch_alone(tiny, monkeypatch, caplog):
    import fewstep.serve.engine as engine

    def crashing(pipeline, prompts, *more):
        if "a bad fox" in prompts:
            raise ZeroDivisionError("secret: a bad fox")
        return generate(pipeline, prompts, *more)

    service = make_service(tiny)
    with running(service) as server:
        monkeypatch.setattr(engine, "generate", crashing)
        with pytest.raises(openai.InternalServerError) as failed:
            server.client.images.generate(prompt="a bad fox")
        assert "secret" not in str(failed.value)
        with pytest.raises(openai.APIError):
            list(server.client.images.generate(prompt="a bad fox", stream=True))
        assert server.images("a cat", extra={"steps": 1})
    assert service.metrics.registry.get_sample_value("fewstep_errors_total", {"kind": "crash"}) == 2


def test_out_of_memory_halves_the_batch(gated, tiny, monkeypatch):
    import fewstep.serve.engine as engine

    sizes = []

    def small_memory(pipeline, prompts, params, *more):
        sizes.append(len(prompts))
        if len(prompts) > 1 or params.width == 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(pipeline, prompts, params, *more)

    monkeypatch.setattr(engine, "generate", small_memory)
    first = later(gated, "a fox")
    wait_for(lambda: gated.gate.inside == 1)
    waiting = [later(gated, f"a bear {index}") for index in range(4)]
    queued(gated, 4)
    gated.gate.open.set()
    first.result()
    for index, each in enumerate(waiting):
        expected = generate(tiny, [f"a bear {index}"], SamplingParams(seed=1, steps=1)).images[0]
        assert torch.equal(pixels(open_image(each.result().data[0].b64_json)), expected)
    assert sizes == [1, 4, 2, 1, 1, 2, 1, 1]
    assert len(later(gated, "a cat", n=2).result().data) == 2
    assert sizes[8:] == [1, 1]  # it has learned
    with pytest.raises(openai.APIStatusError) as failed:
        gated.client.images.generate(prompt="a fox", size="128x128")
    assert (failed.value.status_code, failed.value.code) == (503, "out_of_memory")


def test_keys_are_required_and_compared(tiny, tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# clients\nann 0123456789abcdef\n\nfedcba9876543210\n", encoding="utf-8")
    keys = read_api_keys(file)
    assert [keys.client(f"Bearer {key}") for key in ("0123456789abcdef", "fedcba9876543210")] == ["ann", "key 4"]
    for wrong in (None, "", "Bearer", "Bearer 0123456789abcde", "Basic 0123456789abcdef", "Bearer \udc80"):
        assert keys.client(wrong) is None
    with running(make_service(tiny), keys, "0123456789abcdef") as server:
        assert server.images("a fox", extra={"steps": 1})
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).images.generate(prompt="a fox")
        for path, status in (("health", 200), ("ready", 200), ("", 200), ("metrics", 401), ("v1/models", 401)):
            assert status_of(server, f"/{path}") == status


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no keys"),
        ("short", "line 1 is shorter than 16"),
        ("0123456789abcdef\nann 0123456789abcdef", "line 2 is there twice"),
        ("a b 0123456789abcdef", "line 1 has 3 words"),
    ],
)
def test_bad_key_files(tmp_path, content, message):
    (tmp_path / "keys.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        read_api_keys(tmp_path / "keys.txt")


def post(port, body):
    """A socket on which a request for images was sent; closing it is all that the server sees of its end."""
    content = json.dumps(body).encode()
    sent = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    sent.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return sent


def status_of(server, path, method="GET", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request(method, path, body, headers or {})
    status = connection.getresponse().status
    connection.close()
    return status


def test_other_websites_and_long_bodies_are_refused(tiny):
    with running(make_service(tiny)) as server:
        json_type = {"content-type": "application/json"}
        post = ("/v1/images/generations", "POST")
        assert status_of(server, *post, b'{"prompt": "' + b"x" * 2**18 + b'"}', json_type) == 413
        assert status_of(server, *post, b'{"prompt": "a fox"}', json_type | {"Origin": "http://evil.example"}) == 403
        assert status_of(server, *post, b'{"prompt": "a fox"}', json_type | {"Host": "evil.example"}) == 403
        assert status_of(server, *post, b'{"prompt": "a fox"}', {"content-type": "text/plain"}) == 400
        assert status_of(server, *post, b"[" * 100_000, json_type) == 400
        own = {"Origin": server.url, "Host": f"127.0.0.1:{server.port}"}
        assert status_of(server, *post, b'{"prompt": "a fox", "steps": 1}', json_type | own) == 200


@pytest.mark.slow
def test_sigterm_finishes_what_was_taken_and_then_ends(tiny_folder):
    """As a program: the address it prints, the requests in progress, the exit code, and a log without prompts."""
    server = subprocess.Popen(
        [sys.executable, "-m", "fewstep", "serve", str(tiny_folder), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while "serving" not in (line := server.stderr.readline()):
            assert line
        url = line.split()[2].rstrip("/")
        wait_for(lambda: answers(f"{url}/ready"))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        options = {"prompt": "a secret fox", "n": 4, "extra_body": {"steps": 60}}
        with ThreadPoolExecutor(2) as threads:
            made = [threads.submit(lambda: client.images.generate(**options)) for _ in range(2)]
            wait_for(lambda: "fewstep_queue_images 4.0" in metrics(url) or "fewstep_queue_images 8.0" in metrics(url))
            server.send_signal(signal.SIGTERM)
            assert [len(each.result().data) for each in made] == [4, 4]
        assert server.wait(60) == 0
        log = server.stderr.read()
        records = [json.loads(line)["record"] for line in log.splitlines()]
        assert [record["images"] for record in records] == [4, 4]
        assert "secret" not in log
    finally:
        server.kill()


def answers(url):
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except OSError:
        return False


def metrics(url):
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return answer.read().decode()
