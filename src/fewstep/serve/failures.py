"""What a client is answered to each kind of error, in OpenAI's form."""

from __future__ import annotations

import json
import logging

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fewstep.errors import UserError
from fewstep.serve.drawing import OutOfMemory
from fewstep.serve.error_answers import error_answer, queue_full, timed_out
from fewstep.serve.scheduler import QueueFull
from fewstep.serve.schema import describe_errors
from fewstep.serve.service import Service, UnknownModel

log = logging.getLogger("fewstep.serve")


class Unauthorized(Exception):
    """No valid API key."""


class Disconnected(Exception):
    """The client is gone."""


def failure(service: Service, error: Exception) -> JSONResponse:
    """The answer to an error; what is no user's mistake is counted, and logged with its traceback."""
    if isinstance(error, UserError):
        message = str(error).encode("utf-8", "replace").decode()
        return error_answer(400, message, param=message.partition(":")[0] if ":" in message else None)
    if isinstance(error, RequestValidationError):
        message, param = describe_errors(error.errors())
        return error_answer(400, message, param=param)
    if isinstance(error, UnknownModel):
        return error_answer(404, str(error), param="model", code="model_not_found")
    if isinstance(error, Unauthorized):
        response = error_answer(401, "no valid API key in the header Authorization: Bearer KEY", code="invalid_api_key")
        response.headers["WWW-Authenticate"] = "Bearer"
        return response
    if isinstance(error, HTTPException):
        return error_answer(error.status_code, str(error.detail))
    if isinstance(error, QueueFull):
        service.metrics.error("queue_full")
        return queue_full(error.retry_after)
    if isinstance(error, TimeoutError):
        service.metrics.error("timeout")
        return timed_out(service.settings.timeout)
    if isinstance(error, OutOfMemory):
        service.metrics.error("out_of_memory")
        return error_answer(503, str(error), "server_error", code="out_of_memory")
    if isinstance(error, Disconnected):
        service.metrics.error("disconnected")
        return error_answer(499, "the client is gone")
    service.metrics.error("crash")
    log.error(json.dumps({"event": "crash", "error": type(error).__name__}), exc_info=error)
    return error_answer(
        500, "the request failed; the server's log has the reason", "server_error", code="internal_error"
    )
