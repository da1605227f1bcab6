"""The HTTP application: routes, errors, and one log line for each request for images."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from fewstep.errors import UserError
from fewstep.serve.drawing import OutOfMemory
from fewstep.serve.error_answers import error_answer
from fewstep.serve.failures import Disconnected, Unauthorized, failure
from fewstep.serve.forms import edit_schema, read_edit, read_instruction_edit
from fewstep.serve.guards import Guards
from fewstep.serve.images import AS_URLS, encode_image, to_base64
from fewstep.serve.jobs import Upload
from fewstep.serve.scheduler import QueueFull
from fewstep.serve.schema import ErrorAnswer, GenerationRequest, ImageAnswer, ImagesAnswer, seeded
from fewstep.serve.service import Service, Ticket, UnknownModel
from fewstep.serve.settings import ApiKeys
from fewstep.serve.stream import stream_events

log = logging.getLogger("fewstep.serve")

PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "": ("index.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "edit.js": ("edit.js", "text/javascript"),
    "loras.js": ("loras.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
}

Result = TypeVar("Result")


def authorized(http: Request) -> str:
    """The client of a request, by its API key. Raises: Unauthorized."""
    client: str | None = http.app.state.keys.client(http.headers.get("authorization"))
    if client is None:
        raise Unauthorized
    return client


Client = Annotated[str, Depends(authorized)]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=256,
        description="Extension. Requests of one key draw the same random seed: repeated, they give the same images.",
    ),
]


def make_app(service: Service, keys: ApiKeys) -> FastAPI:
    """The application of one model."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.scheduler.stop, service.settings.drain)

    app = FastAPI(title="fewstep", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guards, local=not keys.required, answered=service.metrics.answer)
    app.state.keys = keys

    @app.post("/v1/images/generations", response_model=ImagesAnswer, responses=_ERRORS)
    async def generations(body: GenerationRequest, http: Request, client: Client, key: Key = None) -> Any:
        """Images from a prompt; with ``stream``, server-sent events."""
        body = seeded(body, key)
        ticket = service.submit(body, client, await service.revise(body))
        return await _answer(service, ticket, body, http, "image_generation")

    @app.post("/v1/images/edits", response_model=ImagesAnswer, responses=_ERRORS, openapi_extra=edit_schema())
    async def edits(http: Request, client: Client, key: Key = None) -> Any:
        """Images from an image and a prompt; where there is a mask, only its transparent pixels are drawn anew. A model
        that edits by instruction takes several images as ``image[]``, and no mask."""
        upload: Upload
        if service.editor is None:
            body, upload = await read_edit(http, service.params)
        else:
            body, upload = await read_instruction_edit(http, service.editor.family)
        body = seeded(body, key)
        ticket = service.submit(body, client, await service.revise(body), upload)
        return await _answer(service, ticket, body, http, "image_edit")

    @app.get("/v1/models")
    async def models(client: Client) -> dict[str, Any]:
        """The served model, its defaults and limits."""
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name}", responses=_ERRORS)
    async def model(name: str, client: Client) -> dict[str, Any]:
        """The served model."""
        if name != service.name:
            raise UnknownModel(f"model: this server has {service.name!r}")
        return service.describe()

    @app.get("/images/{name}", include_in_schema=False)
    async def image(name: str) -> Response:
        found = None if service.store is None else service.store.get(name)
        if found is None:
            raise HTTPException(404, "no such image, or no longer")
        return Response(found[0], media_type=found[1], headers={"X-Content-Type-Options": "nosniff"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": ErrorAnswer}})
    async def ready() -> Any:
        """200 while requests are drawn; 503 before the first image is drawn, and while the server stops."""
        if service.ready and service.scheduler.alive:
            return {"status": "ready"}
        return error_answer(503, "not ready", "server_error", code="not_ready")

    @app.get("/metrics", response_class=Response)
    async def metrics(client: Client) -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.dump(), media_type=service.metrics.content_type)

    @app.get("/", include_in_schema=False)
    @app.get("/{file}", include_in_schema=False)
    async def page(file: str = "") -> Response:
        if file not in _PAGE_FILES:
            raise HTTPException(404, "no such page")
        name, media_type = _PAGE_FILES[file]
        return Response((PAGE / name).read_bytes(), media_type=media_type, headers=_PAGE_HEADERS)

    @app.exception_handler(Exception)
    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(UserError)
    @app.exception_handler(UnknownModel)
    @app.exception_handler(Unauthorized)
    @app.exception_handler(QueueFull)
    @app.exception_handler(OutOfMemory)
    @app.exception_handler(TimeoutError)
    @app.exception_handler(Disconnected)
    async def failed(http: Request, error: Exception) -> JSONResponse:
        return failure(service, error)

    return app


async def _answer(service: Service, ticket: Ticket, body: GenerationRequest, http: Request, kind: str) -> Any:
    if body.stream:

        def failed(error: Exception) -> dict[str, Any]:
            content: dict[str, Any] = json.loads(bytes(failure(service, error).body))
            return content

        async def logged() -> AsyncIterator[str]:
            try:
                async for text in stream_events(ticket, body, kind, failed):
                    yield text
            finally:
                _log(service, ticket)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(logged(), media_type="text/event-stream", headers=headers)
    try:
        images = await _unless_disconnected(http, ticket.images())
        start = time.monotonic()
        data = [ImageAnswer(seed=seed, revised_prompt=ticket.revised_prompt) for seed in ticket.request.seeds]
        for index, (answer, image) in enumerate(zip(data, images, strict=True)):
            answer.safety = await service.decide(image)
            if answer.safety is not None and answer.safety.flagged:
                continue
            content = await asyncio.to_thread(
                encode_image, image, body.output_format, body.output_compression, ticket.metadata(index)
            )
            if body.response_format == "url" and service.store is not None:
                answer.url = str(http.url_for("image", name=service.store.add(content, body.output_format)))
            else:
                answer.b64_json = to_base64(content)
        service.metrics.phase("encode", time.monotonic() - start)
    except Exception as error:  # answered here: the framework would raise it again, into another log
        return failure(service, error)
    finally:
        ticket.cancel()
        _log(service, ticket)
    resolved = ticket.request.resolved
    made = ImagesAnswer(
        created=int(time.time()),
        data=data,
        output_format=body.output_format,
        size=f"{resolved.width}x{resolved.height}",
        steps=resolved.steps,
    )
    by_gateway = body.response_format == "url" and service.store is None
    return JSONResponse(made.model_dump(exclude_none=True), headers={AS_URLS: "1"} if by_gateway else None)


async def _unless_disconnected(http: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``. Raises: Disconnected as soon as the client is gone; the work is cancelled then."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Disconnected
        return done.result()
    finally:
        done.cancel()
        gone.cancel()


def _log(service: Service, ticket: Ticket) -> None:
    """One line in JSON, without the prompt unless it is wanted; and the latency of each phase."""
    request, now = ticket.request, time.monotonic()
    started, finished = request.started or now, request.finished or now
    service.metrics.phase("queue", started - request.submitted)
    service.metrics.phase("draw", finished - started)
    content: dict[str, Any] = {
        "event": "images",
        "request": request.number,
        "client": request.client,
        "images": len(request.seeds),
        "size": f"{request.resolved.width}x{request.resolved.height}",
        "steps": request.resolved.steps,
        "done": request.finished is not None,
        "queue_seconds": round(started - request.submitted, 4),
        "draw_seconds": round(finished - started, 4),
        "total_seconds": round(now - request.submitted, 4),
    }
    if service.settings.log_prompts:
        content["prompt"] = request.prompt
    log.info(json.dumps(content))
