"""The server beside the straightforward way: throughput and latency at rising load, and a soak.

    python benchmarks/serve.py load --requests 40
    python benchmarks/serve.py soak --requests 500

``load``: the bare batched loop sets the scale. Then, at fractions of its throughput, requests arrive at random times
(Poisson) at three servers in this process: fewstep's with batches, fewstep's without (one image at a time), and a plain
one, FastAPI with a lock around the pipeline, as one writes it in an hour.

``soak``: random sizes, steps and seeds; some clients cancel, are killed in the middle, or send nonsense. Every image is
compared with the one of ``fewstep generate`` to the bit; memory is shown at the start and at the end.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import random
import socket
import statistics
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from fewstep.data.images import to_pil
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.serve.app import make_app
from fewstep.serve.service import Service
from fewstep.serve.settings import ApiKeys, ServeSettings

PROMPTS = ["a noto emoji of a red apple", "a dog", "a fluent emoji of a cat on a green background", "一辆绿色的汽车"]


class Server:
    """An application on a free port, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


def plain_app(pipeline: TextToImagePipeline) -> FastAPI:
    """The server that one writes first: a thread for each request, and a lock around the model."""
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/images/generations")
    def images(body: dict) -> dict:
        with lock:
            made = generate(pipeline, [body["prompt"]], SamplingParams(seed=body["seed"], steps=body["steps"]))
        buffer = io.BytesIO()
        to_pil(made.images[0]).save(buffer, "PNG")
        return {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}

    return app


def fewstep_server(pipeline: TextToImagePipeline, **settings: object) -> tuple[Server, Service]:
    service = Service(pipeline, "benchmark", "", ServeSettings(max_queue=10_000, timeout=3600.0, **settings))
    server = Server(make_app(service, ApiKeys({})))
    while not service.ready:
        time.sleep(0.01)
    return server, service


def post(port: int, body: dict | bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    content = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", "/v1/images/generations", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    read = answer.status, answer.read()
    connection.close()
    return read


# --- load ---------------------------------------------------------------------------------------------------------


def bare_throughput(pipeline: TextToImagePipeline, steps: int, batch: int) -> float:
    """Images per second of the batched loop alone."""
    params = SamplingParams(steps=steps, batch_size=batch)
    prompts = (PROMPTS * batch)[:batch]
    generate(pipeline, prompts, params)
    start = time.perf_counter()
    for _ in range(3):
        generate(pipeline, prompts, params)
    return 3 * batch / (time.perf_counter() - start)


def under_load(port: int, rate: float, count: int, steps: int) -> tuple[float, list[float]]:
    """Throughput in images per second, and the latency of each request, with Poisson arrivals."""
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))
    start = time.perf_counter()

    def request(index: int) -> float:
        time.sleep(max(0.0, start + arrivals[index] - time.perf_counter()))
        status, _ = post(port, {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index, "steps": steps})
        assert status == 200, status
        return time.perf_counter() - start - arrivals[index]

    with ThreadPoolExecutor(count) as threads:
        latencies = list(threads.map(request, range(count)))
    return count / (time.perf_counter() - start), latencies


def overhead(pipeline: TextToImagePipeline, port: int, steps: int) -> float:
    """Latency of a single request over that of the bare generation: the median of alternating pairs."""
    ratios = []
    for index in range(9):
        start = time.perf_counter()
        generate(pipeline, [PROMPTS[0]], SamplingParams(seed=index, steps=steps))
        middle = time.perf_counter()
        post(port, {"prompt": PROMPTS[0], "seed": index, "steps": steps})
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(ratios)


def load_test(pipeline: TextToImagePipeline, count: int, steps: int, batch: int, loads: list[float]) -> None:
    bare = bare_throughput(pipeline, steps, batch)
    print(f"bare loop, batches of {batch}: {bare:.2f} images/s")
    print("| server | load | images/s | p50 s | p95 s | p99 s |\n|---|---|---|---|---|---|")
    for name in ("fewstep, batches", "fewstep, one at a time", "plain FastAPI"):
        if name == "plain FastAPI":
            server = Server(plain_app(pipeline))
        else:
            server, _ = fewstep_server(pipeline, max_batch=batch if name.endswith("batches") else 1)
        for load_factor in loads:
            throughput, latencies = under_load(server.port, load_factor * bare, count, steps)
            p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
            print(f"| {name} | {load_factor:g} | {throughput:.2f} | {p50:.2f} | {p95:.2f} | {p99:.2f} |", flush=True)
        if name == "fewstep, batches":
            print(f"  one request over the bare generation: {overhead(pipeline, server.port, steps):.3f} x", flush=True)
        server.stop()


# --- soak ---------------------------------------------------------------------------------------------------------


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(pipeline: TextToImagePipeline, count: int, clients: int) -> None:
    server, service = fewstep_server(pipeline)
    outcomes: Counter[str] = Counter()
    lock, checked = threading.Lock(), []

    def client(index: int) -> None:
        chance = random.Random(index)
        body = {
            "prompt": chance.choice(PROMPTS),
            "seed": index,
            "steps": chance.choice([1, 2, 4]),
            "size": chance.choice(["64x64", "64x64", "32x64"]),
            "n": chance.choice([1, 1, 2]),
        }
        kind = chance.choices(["good", "killed", "bad"], [8, 1, 1])[0]
        if kind == "bad":
            status, _ = post(server.port, chance.choice([b"{", b'{"prompt": 1}', b'{"prompt": "a", "size": "1x1"}']))
            outcome = "bad body refused" if status == 400 else f"bad body: status {status}"
        elif kind == "killed":
            content = json.dumps(body | {"stream": chance.random() < 0.5}).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as sent:
                head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
                sent.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
                time.sleep(chance.random() * 0.5)
            outcome = "client killed"
        else:
            status, content = post(server.port, body)
            outcome = "answered" if status == 200 else f"lost: status {status}"
            if status == 200:
                images = [each["b64_json"] for each in json.loads(content)["data"]]
                with lock:
                    checked.append((body, images))
        with lock:
            outcomes[outcome] += 1

    memory, start = [resident_mib()], time.perf_counter()
    for first in range(0, count, max(1, count // 4)):
        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(client, range(first, min(count, first + count // 4))))
        memory.append(resident_mib())
    seconds = time.perf_counter() - start
    wrong = sum(not same(pipeline, body, images) for body, images in checked)
    print(f"{count} requests in {seconds:.0f} s: {dict(outcomes)}")
    print(f"wrong images: {wrong} of {sum(len(images) for _, images in checked)}")
    print(f"waiting at the end: {service.scheduler.queued}; resident MiB by quarter: {[round(m) for m in memory]}")
    server.stop()


def same(pipeline: TextToImagePipeline, body: dict, images: list[str]) -> bool:
    """Whether the server's images are those of ``generate``."""
    width, height = map(int, body["size"].split("x"))
    params = SamplingParams(seed=body["seed"], steps=body["steps"], width=width, height=height, batch_size=1)
    expected = generate(pipeline, [body["prompt"]] * len(images), params).images
    found = [np.array(Image.open(io.BytesIO(base64.b64decode(each)))) for each in images]
    return torch.equal(torch.from_numpy(np.stack(found)), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "soak"])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.7, 1.2], help="of the bare loop's throughput")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--guidance", action="store_true", help="keep the model's guidance; off, as for a student")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    pipeline = load(options.model, "cpu")
    if not options.guidance:
        pipeline.generation_config = pipeline.generation_config.model_copy(update={"guidance_scale": 0.0})
    if options.what == "load":
        load_test(pipeline, options.requests, options.steps, options.batch, options.loads)
    else:
        soak(pipeline, options.requests, options.clients)


if __name__ == "__main__":
    main()
