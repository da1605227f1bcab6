"""A request's events as server-sent events, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from torch import Tensor

from fewstep.serve.error_answers import error_event
from fewstep.serve.images import encode_image, to_base64
from fewstep.serve.jobs import Drawn, Progress
from fewstep.serve.schema import GenerationRequest, SafetyDecision
from fewstep.serve.service import Ticket, until

_KEEP_ALIVE = 15.0  # seconds; proxies close connections that are silent
_POSITION = 0.5  # seconds between reports of the position in the queue


async def stream_events(
    ticket: Ticket, body: GenerationRequest, kind: str, failed: Callable[[Exception], dict[str, Any]]
) -> AsyncIterator[str]:
    """The text of the stream. A client that disconnects ends it, which cancels the request.

    Args:
        kind: "image_generation" or "image_edit".
        failed: the error as the answer has it.
    """
    seconds = _POSITION if body.progress else _KEEP_ALIVE
    try:
        if body.progress:
            yield _queued(ticket, kind)
        async for event in until(ticket, seconds):
            if event is None:
                waiting = body.progress and ticket.request.started is None
                yield _queued(ticket, kind) if waiting else ": waiting\n\n"
            elif isinstance(event, Drawn):
                image, decision = await _sendable(ticket, event.image, body, ticket.metadata(event.index))
                usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
                usage["input_tokens_details"] = {"image_tokens": 0, "text_tokens": 0}  # type: ignore[assignment]
                more = {"usage": usage, "seed": ticket.request.seeds[event.index], "index": event.index}
                if ticket.revised_prompt is not None:
                    more["revised_prompt"] = ticket.revised_prompt
                if decision is not None:
                    more["safety"] = decision.model_dump()
                yield _event(f"{kind}.completed", _image(ticket, body, image) | more)
            elif isinstance(event, Progress):
                if body.progress:
                    step = {"step": event.step, "steps": event.steps, "index": event.index}
                    yield _event(f"{kind}.progress", step)
                if event.preview is not None:
                    image, _ = await _sendable(ticket, event.preview, body, None)
                    if image is None:
                        continue
                    more = {"partial_image_index": event.preview_index, "index": event.index}
                    yield _event(f"{kind}.partial_image", _image(ticket, body, image) | more)
    except Exception as error:
        yield error_event(failed(error))
    finally:
        ticket.cancel()


def _queued(ticket: Ticket, kind: str) -> str:
    ahead, seconds = ticket.service.scheduler.position(ticket.request)
    return _event(f"{kind}.queued", {"images_ahead": ahead, "estimated_seconds": round(seconds, 2)})


async def _sendable(
    ticket: Ticket, image: Tensor, body: GenerationRequest, text: str | None
) -> tuple[str | None, SafetyDecision | None]:
    """An image in base64, or None if the safety filter withholds it; and the filter's decision."""
    decision = await ticket.service.decide(image)
    if decision is not None and decision.flagged:
        return None, decision
    content = await asyncio.to_thread(encode_image, image, body.output_format, body.output_compression, text)
    return to_base64(content), decision


def _image(ticket: Ticket, body: GenerationRequest, image: str | None) -> dict[str, Any]:
    resolved = ticket.request.resolved
    return {
        "b64_json": image,
        "created_at": int(time.time()),
        "size": f"{resolved.width}x{resolved.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format,
    }


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **content})}\n\n"
