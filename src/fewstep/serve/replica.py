"""A replica of the fleet: the single-process server without its sockets, in an actor of Ray Serve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.types import ASGIApp, Message

from fewstep.serve.app import make_app
from fewstep.serve.guards import replay
from fewstep.serve.logs import log_to_stderr
from fewstep.serve.prepare import prepare
from fewstep.serve.settings import client_keys

if TYPE_CHECKING:
    from fewstep.serve.fleet import FleetSettings

LORA_SETS = 8  # sets of LoRA files, those used last, whose requests prefer this replica


class Replica:
    """One model with its own queue and batches, and the application that answers with them.

    Raises:
        UserError: the model, keys or LoRA files cannot be read on this machine.
    """

    def __init__(self, fleet: FleetSettings) -> None:
        log_to_stderr()
        keys = client_keys(fleet.api_keys)
        self.service = prepare(fleet, fleet)()
        self.service.store = None
        self.app = make_app(self.service, keys)
        self.service.start()

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose check fails."""
        if not self.service.scheduler.alive:
            raise RuntimeError("the drawing thread has ended")

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The application's messages, as in ASGI, to a request."""
        names = serve.get_multiplexed_model_id()
        if names and set(json.loads(names)) <= set(self.service.loras.names):
            await self.has(names)
        async for message in messages(self.app, scope, body):
            yield message

    @serve.multiplexed(max_num_models_per_replica=LORA_SETS)
    async def has(self, names: str) -> str:
        """Makes Ray Serve prefer this replica for these LoRA files, which the engine reads and keeps by itself."""
        return names

    def metrics(self) -> tuple[str, str]:
        """The replica's name, and its metrics in Prometheus' text format."""
        return serve.get_replica_context().replica_tag, self.service.metrics.dump().decode()


async def messages(app: ASGIApp, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
    """What an application sends for a request. When the iteration ends early, the application sees a client that
    disconnected."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()

    async def disconnected() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(dict(scope), replay(body, disconnected), sent.put)
        finally:
            await sent.put(None)

    running, any_sent = asyncio.create_task(run()), False
    try:
        while (message := await sent.get()) is not None:
            any_sent = True
            yield message
        if not any_sent:
            await running  # raises its error; an answered one is in the log already
    finally:
        gone.set()
        await asyncio.wait({running})
