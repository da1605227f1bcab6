"""Servers on a free port of this process, for the benchmarks of the server."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn
from fastapi import FastAPI

from fewstep.models.pipeline import TextToImagePipeline
from fewstep.serve.app import make_app
from fewstep.serve.loras import LoraFolder
from fewstep.serve.service import Service
from fewstep.serve.settings import ApiKeys, ServeSettings


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


def fewstep_server(
    pipeline: TextToImagePipeline, loras: LoraFolder | None = None, **settings: object
) -> tuple[Server, Service]:
    settings = {"max_queue": 10_000, "timeout": 3600.0, **settings}
    service = Service(pipeline, "benchmark", "", ServeSettings(**settings), loras=loras)
    server = Server(make_app(service, ApiKeys({})))
    while not service.ready:
        time.sleep(0.01)
    return server, service
