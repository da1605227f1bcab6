"""The fleet's gateway: hands each request to a replica, and to another one where that replica is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as METRICS_TYPE
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from fewstep.serve.error_answers import error_answer, error_event, queue_full, timed_out
from fewstep.serve.guards import BodyRefused, read_body
from fewstep.serve.images import AS_URLS, ImageStore, from_base64
from fewstep.serve.logs import log_to_stderr

log = logging.getLogger("fewstep.serve")

ATTEMPTS = 3  # replicas that a request may lose: one that ends its process must not end all of them
LOST = (RayActorError, ObjectLostError)  # a replica's process or machine ended
MAX_ID = 1000  # characters
IMAGES = "/images/"  # the path of images with a URL
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
_EVENTS = (b".partial_image", b".progress", b".completed")  # which a repeated request sends again

_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")

#: Begins a request at a replica: (scope, body, LoRA names) -> its messages.
Send = Callable[[dict[str, Any], bytes, str], AsyncGenerator[Message]]


class Gateway:
    """The deployment that HTTP requests reach.

    A request has an ``Idempotency-Key``, its client's or a new one, so that it gives the same images wherever it is
    repeated.

    Args:
        timeout: seconds until an answer begins, waiting included.
    """

    def __init__(self, replicas: DeploymentHandle, timeout: float) -> None:
        log_to_stderr()
        self._timeout = timeout
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._images = ImageStore()
        self._seconds = 1.0  # that a request took of late
        self._registry = CollectorRegistry()
        self._repeated = Counter(
            "fewstep_repeated",
            "Requests that began again, each time because a replica was lost.",
            registry=self._registry,
        )

    async def __call__(self, http: Request) -> Response:
        if http.method == "GET" and http.url.path.startswith(IMAGES):
            return self._image(http.url.path.removeprefix(IMAGES))
        try:
            body = await read_body(http.receive, http.headers.get("content-type", ""))
        except BodyRefused as refused:
            return error_answer(refused.status, str(refused))
        scope = {name: http.scope[name] for name in _SCOPE if name in http.scope}
        scope["headers"] = [*scope["headers"]]
        if "idempotency-key" not in http.headers:
            scope["headers"].append((b"idempotency-key", uuid.uuid4().hex.encode()))
        answer = answered(self._send, scope, body, self._repeated.inc)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                start = await anext(answer)
        except TimeoutError:
            return timed_out(self._timeout)
        except BackPressureError:
            return queue_full(self._seconds)
        except LOST:
            return replicas_lost()

        if http.url.path == "/metrics" and start["status"] == 200:
            pages = await self._replicas.broadcast("metrics").results_async()
            pages.append(("gateway", generate_latest(self._registry).decode()))
            return Response(joined_metrics(dict(pages)), media_type=METRICS_TYPE)
        if any(name == AS_URLS.encode() for name, _ in start["headers"]):
            return await self._with_urls(answer, f"{http.base_url}{IMAGES.lstrip('/')}")

        async def content() -> AsyncIterator[bytes]:
            async with aclosing(answer):
                async for message in answer:
                    yield message["body"]
            if http.method == "POST":
                self._seconds = 0.7 * self._seconds + 0.3 * (time.monotonic() - began)

        response = StreamingResponse(content(), start["status"])
        response.raw_headers = start["headers"]
        return response

    async def _with_urls(self, answer: AsyncGenerator[Message], prefix: str) -> Response:
        """An answer whose images have URLs, which begin with ``prefix``; the gateway keeps them."""
        async with aclosing(answer):
            parts = [message["body"] async for message in answer]
        try:
            content = json.loads(b"".join(parts))
            for image in content["data"]:
                if (encoded := image.pop("b64_json", None)) is not None:  # none where the filter withholds it
                    image["url"] = prefix + self._images.add(from_base64(encoded), content["output_format"])
        except (ValueError, KeyError):  # an event of a stream that lost its replicas
            return replicas_lost()
        return JSONResponse(content)

    def _image(self, name: str) -> Response:
        """An image that has a URL."""
        found = self._images.get(name)
        if found is None:
            return error_answer(404, "no such image, or no longer")
        return Response(found[0], media_type=found[1], headers={"X-Content-Type-Options": "nosniff"})

    async def _send(self, scope: dict[str, Any], body: bytes, loras: str) -> AsyncGenerator[Message]:
        replicas = self._replicas.options(multiplexed_model_id=loras) if loras else self._replicas
        response: Any = replicas.remote(scope, body)  # a generator, as the options have stream
        try:
            async for message in response:
                yield message
        finally:
            response.cancel()  # without effect on what is done


async def answered(
    send: Send, scope: dict[str, Any], body: bytes, repeated: Callable[[], None] = lambda: None
) -> AsyncGenerator[Message]:
    """The messages of one answer: a start, then the body. Where a replica is lost, the request begins again at another
    one, and what the client has already is left out.

    Args:
        repeated: called when the request begins again.

    Raises:
        RayError: of the last attempt, where nothing was sent: replicas were lost, or too many requests wait.
    """
    started, refused = False, False
    sent: set[Hashable] = set()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with aclosing(send(scope, body, lora_names(body))) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        refused = started and message["status"] != 200
                        if started:
                            continue
                        started = True
                    elif refused:  # the client reads a stream already: no other status can reach it
                        yield _error(json.loads(message["body"]))
                        return
                    elif (key := event_key(message["body"])) is not None:
                        if key in sent:
                            continue
                        sent.add(key)
                    yield message
            return
        except LOST as lost:
            log.warning(json.dumps({"event": "replica lost", "attempt": attempt, "error": type(lost).__name__}))
            if attempt == ATTEMPTS:
                if not started:
                    raise
                break
            repeated()
        except BackPressureError:
            if not started:
                raise
            break
        await asyncio.sleep(0.1 * attempt)  # Ray Serve learns meanwhile which replica it is
    yield _error(json.loads(bytes(replicas_lost().body)))


def lora_names(body: bytes) -> str:
    """The LoRA files that a body in JSON names, as a model id of Ray Serve; "" for none. The body is unchecked."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    loras = content.get("lora") if isinstance(content, dict) else None
    names = json.dumps(sorted(loras)) if loras and isinstance(loras, dict) else ""
    return names if len(names) <= MAX_ID else ""


def event_key(event: bytes) -> Hashable | None:
    """What an event of a stream is about; None for one that may come twice, and for what is no event."""
    name, _, data = event.partition(b"\ndata: ")
    if not name.startswith(b"event: ") or not name.endswith(_EVENTS):
        return None
    content = json.loads(data)
    return name, content.get("index"), content.get("step"), content.get("partial_image_index")


def joined_metrics(pages: Mapping[str, str]) -> str:
    """One page in Prometheus' text format from those of the replicas, by their names, which become a label."""
    families: dict[str, list[str]] = {}
    samples: list[str] = []
    for replica, page in pages.items():
        for line in page.splitlines():
            if line.startswith("#"):
                samples = families.setdefault(line, [])
            else:
                name, labels, value = _SAMPLE.fullmatch(line).groups("")  # type: ignore[union-attr]
                samples.append(f'{name}{{replica="{replica}"{"," if labels else ""}{labels}}} {value}')
    return "".join(f"{line}\n" for header, lines in families.items() for line in (header, *lines))


def replicas_lost() -> JSONResponse:
    """The answer to a request whose replicas were lost."""
    return error_answer(503, "the replicas were lost; try again", "server_error", code="replicas_lost")


def _error(answer: dict[str, Any]) -> Message:
    return {"type": "http.response.body", "body": error_event(answer).encode()}
