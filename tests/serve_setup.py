"""A real server in a thread on a free port, and OpenAI's client for it."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn
from openai import OpenAI
from PIL import Image

from fewstep.models.pipeline import TextToImagePipeline
from fewstep.serve.app import make_app
from fewstep.serve.service import Service
from fewstep.serve.settings import ApiKeys, ServeSettings


class Running:
    """Attributes: the service, the server's address, and a client of it."""

    def __init__(self, service: Service, port: int, key: str = "none") -> None:
        self.service, self.port, self.url = service, port, f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def images(self, prompt: str, **options: object) -> list[Image.Image]:
        """Images drawn by the server; extensions go into ``extra``."""
        extra = options.pop("extra", {})
        made = self.client.images.generate(prompt=prompt, extra_body=extra, **options)
        return [open_image(each.b64_json) for each in made.data]


def open_image(b64: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    image.load()
    return image


PARTS = ("loras", "enhancer", "safety_filter")


def make_service(pipeline: TextToImagePipeline, **options: object) -> Service:
    """Options are settings of the server, or parts of the service."""
    parts = {name: options.pop(name) for name in PARTS if name in options}
    return Service(pipeline, "tiny", "fingerprint", ServeSettings(**options), **parts)


@contextmanager
def running(service: Service, keys: ApiKeys | None = None, key: str = "none") -> Iterator[Running]:
    """Inside, the service answers on a free port."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(service, keys or ApiKeys({})), log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_for(lambda: service.ready)
        yield Running(service, bound.getsockname()[1], key)
    finally:
        server.should_exit = True
        thread.join(60)
        bound.close()
        assert not thread.is_alive()


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def pixels(image: Image.Image) -> torch.Tensor:
    """uint8 [H, W, 3]."""
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(
        image.height, image.width, 3
    )
