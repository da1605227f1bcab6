"""The server beside the straightforward way: throughput and latency at rising load, and a soak.

    python benchmarks/serve.py load --requests 40
    python benchmarks/serve.py soak --requests 500

``load``: the bare batched loop sets the scale. Then, at fractions of its throughput, requests arrive at random times
(Poisson) at three servers in this process: fewstep's with batches, fewstep's without (one image at a time), and a plain
one, FastAPI with a lock around the pipeline, as one writes it in an hour. The clients are another process.

``soak``: random sizes, steps, seeds and LoRA files; some clients cancel a stream, are killed, or send nonsense. Every
image is compared with the one of ``fewstep generate`` to the bit; memory is shown at the start and after each quarter.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from serve_bench import Server, fewstep_server
from serve_clients import PROMPTS, post
from serve_soak import soak

from fewstep.data.images import to_pil
from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.pipeline import TextToImagePipeline, load

BARE_BATCHES = 10  # of the bare loop, for its throughput


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


def bare_throughput(pipeline: TextToImagePipeline, steps: int, batch: int) -> float:
    """Images per second of the batched loop alone."""
    params = SamplingParams(steps=steps, batch_size=batch)
    prompts = (PROMPTS * batch)[:batch]
    generate(pipeline, prompts, params)
    start = time.perf_counter()
    for _ in range(BARE_BATCHES):
        generate(pipeline, prompts, params)
    return BARE_BATCHES * batch / (time.perf_counter() - start)


def under_load(port: int, rate: float, count: int, steps: int) -> tuple[float, list[float]]:
    """Throughput in images per second, and the latency of each request, with Poisson arrivals from another process."""
    command = [sys.executable, str(Path(__file__).with_name("serve_clients.py"))]
    command += [str(each) for each in (port, rate, count, steps)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return count / found["seconds"], found["latencies"]


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
            # other guests of the machine change its speed within minutes
            around = statistics.mean([bare, bare_throughput(pipeline, steps, batch)])
            print(f"  load {loads[-1]:g} over the bare loop before and after: {throughput / around:.2f} x")
            print(f"  one request over the bare generation: {overhead(pipeline, server.port, steps):.3f} x", flush=True)
        server.stop()


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
        soak(pipeline, options.model, options.requests, options.clients)


if __name__ == "__main__":
    main()
