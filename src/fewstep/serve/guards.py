"""What every request passes before the application sees it: where it comes from, and how long its body is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.serve.settings import MAX_JSON, MAX_UPLOAD, is_loopback

BODY_SECONDS = 30.0  # for the whole body to arrive


class Guards:
    """Refuses requests of other websites' pages, and bodies that are too long or too slow.

    Args:
        local: the server is reached from this machine alone: requests must name it by a name of this machine. Another
            website's name that leads here (DNS rebinding) is refused.
        answered: told each status.
    """

    def __init__(self, app: ASGIApp, local: bool, answered: Callable[[int], None]) -> None:
        self.app, self.local, self.answered = app, local, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(message["status"])
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            await _refuse(counted, 403, "host: this server answers to localhost and 127.0.0.1 only")
            return
        if origin is not None and urlsplit(origin).netloc != host:
            await _refuse(counted, 403, "origin: pages of other websites may not use this server")
            return
        try:
            body = await read_body(receive, headers.get("content-type", ""))
        except BodyRefused as refused:
            await _refuse(counted, refused.status, str(refused))
            return
        await self.app(scope, replay(body, receive), counted)


class BodyRefused(Exception):
    """``status``: of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_body(receive: Receive, content_type: str) -> bytes:
    """The whole body of a request. Raises: BodyRefused where it is too long or too slow."""
    limit = MAX_UPLOAD if content_type.startswith("multipart/form-data") else MAX_JSON
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > limit:
                    raise BodyRefused(413, f"the body is longer than {limit} bytes")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise BodyRefused(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body in one message, then what comes after it: the disconnection."""
    first = True

    async def replayed() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def _refuse(send: Send, status: int, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
