"""Errors as they are sent, in OpenAI's form. It imports no model, so that the fleet's gateway is light."""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse


def queue_full(retry_after: float) -> JSONResponse:
    """The answer where too much waits; ``retry_after`` is in seconds."""
    seconds = max(1, round(retry_after))
    message = f"the queue is full; try again in {seconds} s"
    response = error_answer(429, message, "rate_limit_error", code="queue_full")
    response.headers["Retry-After"] = str(seconds)
    return response


def timed_out(seconds: float) -> JSONResponse:
    """The answer where a request's time is over."""
    return error_answer(504, f"not done within {seconds:g} s", "server_error", code="timeout")


def error_answer(
    status: int, message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def error_event(answer: dict[str, Any]) -> str:
    """An error that ends a stream, in the form of its answer outside of a stream."""
    return f"event: error\ndata: {json.dumps(answer)}\n\n"
