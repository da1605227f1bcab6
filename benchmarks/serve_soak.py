"""The soak of `benchmarks/serve.py`: random clients, whose images are compared with those of ``fewstep generate``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from serve_bench import fewstep_server
from serve_clients import PROMPTS, post

from fewstep.inference.generate import generate
from fewstep.inference.params import SamplingParams
from fewstep.models.components import resolve_model
from fewstep.models.generation_config import GenerationConfig
from fewstep.models.lora.targets import LoraTargets, model_targets
from fewstep.models.pipeline import TextToImagePipeline, load
from fewstep.serve.loras import LoraFolder


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


LORAS = [{}, {}, {}, {"a": 0.8}, {"b": 1.5}, {"a": -0.5, "b": 0.7}]


def write_loras(folder: Path, targets: LoraTargets) -> None:
    """Two files of random matrices on all attention layers."""
    for seed, name in enumerate("ab"):
        draw, tensors = torch.Generator().manual_seed(seed), {}
        for layer, shape in targets.shapes.items():
            if ".attention.to_" in layer and shape is not None:
                tensors[f"transformer.{layer}.lora_A.weight"] = 0.1 * torch.randn(4, shape[1], generator=draw)
                tensors[f"transformer.{layer}.lora_B.weight"] = 0.1 * torch.randn(shape[0], 4, generator=draw)
        save_file(tensors, folder / f"{name}.safetensors")


def digest(image: Image.Image | np.ndarray) -> bytes:
    """Of an image's pixels: kept images would hide what the server's memory does."""
    return hashlib.sha256(np.array(image).tobytes()).digest()


class Client:
    """One of the soak's clients: sends a request of a random kind, and records what became of it."""

    def __init__(self, port: int) -> None:
        self.port, self.lock = port, threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.answered: list[tuple[dict, list[bytes]]] = []

    def __call__(self, index: int) -> None:
        chance = random.Random(index)
        body = {
            "prompt": chance.choice(PROMPTS),
            "seed": index,
            "steps": chance.choice([1, 2, 4]),
            "size": chance.choice(["64x64", "64x64", "32x64"]),
            "n": chance.choice([1, 1, 2]),
            "lora": chance.choice(LORAS),
        }
        kind = chance.choices(["good", "canceled", "killed", "bad"], [14, 2, 2, 2])[0]
        try:
            outcome = getattr(self, kind)(body, chance)
        except OSError as error:
            outcome = f"lost: {type(error).__name__}"
        with self.lock:
            self.outcomes[outcome] += 1

    def good(self, body: dict, chance: random.Random) -> str:
        status, content = post(self.port, body)
        if status != 200:
            return f"lost: status {status}"
        digests = [
            digest(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in json.loads(content)["data"]
        ]
        with self.lock:
            self.answered.append((body, digests))
        return "answered"

    def bad(self, body: dict, chance: random.Random) -> str:
        wrong = [{"prompt": 1}, {**body, "size": "1x1"}, {**body, "lora": {"nobody": 1}}, {**body, "steps": 0}]
        status, _ = post(self.port, chance.choice([b"{", *(json.dumps(each).encode() for each in wrong)]))
        return "bad body refused" if status == 400 else f"bad body: status {status}"

    def canceled(self, body: dict, chance: random.Random) -> str:
        with self._sent(body | {"stream": True, "progress": True}) as connection:
            for _ in range(chance.randint(1, 3)):
                connection.recv(200)
        return "stream canceled"

    def killed(self, body: dict, chance: random.Random) -> str:
        with self._sent(body):
            time.sleep(chance.random() * 0.5)
        return "client killed"

    def _sent(self, body: dict) -> socket.socket:
        content = json.dumps(body).encode()
        sent = socket.create_connection(("127.0.0.1", self.port))
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        sent.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        return sent


def soak(pipeline: TextToImagePipeline, name: str, count: int, clients: int) -> None:
    with TemporaryDirectory() as folder:
        targets = model_targets(resolve_model(name))
        write_loras(Path(folder), targets)
        server, service = fewstep_server(pipeline, LoraFolder(folder, targets))
        client = Client(server.port)
        memory, start = [resident_mib()], time.perf_counter()
        for quarter in range(4):
            with ThreadPoolExecutor(clients) as threads:
                list(threads.map(client, range(quarter * count // 4, (quarter + 1) * count // 4)))
            memory.append(resident_mib())
        seconds = time.perf_counter() - start
        while service.scheduler.queued:  # of clients that are gone
            time.sleep(0.1)
        server.stop()
        print(f"{count} requests in {seconds:.0f} s: {dict(client.outcomes)}")
        print(f"resident MiB at the start and after each quarter: {[round(each) for each in memory]}", flush=True)
        wrong = wrong_images(pipeline.generation_config, name, Path(folder), client.answered)
        print(f"wrong images: {wrong} of {sum(len(images) for _, images in client.answered)}")


def wrong_images(config: GenerationConfig, name: str, folder: Path, answered: list[tuple[dict, list[bytes]]]) -> int:
    """How many of the server's images are not those of ``generate`` with the model loaded with the LoRA files."""
    wrong = 0
    for lora in LORAS[2:]:
        pipeline = load(name, "cpu", loras={str(folder / f"{each}.safetensors"): s for each, s in lora.items()})
        pipeline.generation_config = config
        for body, images in answered:
            if body["lora"] == lora:
                wrong += count_different(pipeline, body, images)
    return wrong


def count_different(pipeline: TextToImagePipeline, body: dict, digests: list[bytes]) -> int:
    width, height = map(int, body["size"].split("x"))
    params = SamplingParams(seed=body["seed"], steps=body["steps"], width=width, height=height, batch_size=1)
    expected = generate(pipeline, [body["prompt"]] * len(digests), params).images.numpy()
    return sum(found != digest(image) for found, image in zip(digests, expected, strict=True))
