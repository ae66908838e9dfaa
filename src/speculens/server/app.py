"""The routes: OpenAI's, health, metrics and the page."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from speculens.errors import UserError
from speculens.server.errors import ApiError
from speculens.server.guard import Gone, Guard
from speculens.server.images import fetch, is_remote
from speculens.server.metrics import Metrics
from speculens.server.reply import Reply
from speculens.server.schema import ChatRequest, ErrorBody
from speculens.server.settings import Settings
from speculens.server.supervisor import Supervisor, Ticket
from speculens.server.wire import Ask, Messages, Piece

T = TypeVar("T")

FETCHERS = 16  # pictures of other sites that are fetched at a time
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 408, 413, 429, 503)
}


def create_app(settings: Settings, supervisor: Supervisor, metrics: Metrics) -> ASGIApp:
    """The application around a worker that has been started."""
    app = FastAPI(title="speculens", docs_url=None, redoc_url=None)
    desk = _Desk(settings, supervisor, metrics)
    metrics.watch(supervisor)
    answers: dict[int | str, dict[str, Any]] = {**ERRORS, 200: {"content": {"text/event-stream": {}}}}
    app.post("/v1/chat/completions", responses=answers, response_model=None)(desk.chat)
    app.get("/v1/models", responses=ERRORS, response_model=None)(desk.models)
    app.get("/v1/models/{name:path}", responses=ERRORS, response_model=None)(desk.model)  # a name may hold slashes
    app.get("/health", responses=ERRORS, response_model=None)(desk.health)
    app.get("/metrics", responses=ERRORS, response_model=None)(desk.exposition)
    for path, data, kind in _page_files():
        app.get(path, include_in_schema=False, response_model=None)(_file(data, kind))
    handlers = {ApiError: _api_error, RequestValidationError: _invalid, HTTPException: _refused, Exception: _failed}
    for error, handler in handlers.items():
        app.exception_handler(error)(handler)
    return Guard(app, settings, metrics.answered_to)


class _Desk:
    """What the routes share."""

    def __init__(self, settings: Settings, supervisor: Supervisor, metrics: Metrics) -> None:
        self._settings, self._supervisor, self._metrics = settings, supervisor, metrics
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="speculens-fetcher")
        self._born = int(time.time())

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        self._check(body)
        ticket = self._supervisor.open(body.choices)
        try:
            first = await _unless_gone(request, self._first(ticket, body))
            reply = Reply(self._settings.name, body, ticket.begun)
            pieces = self._pieces(ticket, first, reply, request)
            if body.stream:
                return _Events(_chunks(pieces, reply, usage=body.wants_usage), ticket)
            await _unless_gone(request, _exhaust(pieces))
        except BaseException:
            ticket.close()
            raise
        ticket.close()
        return JSONResponse(reply.whole())

    async def models(self) -> Response:
        """The one model that is served, as a list."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """The one model that is served."""
        self._check_name(name)
        return JSONResponse(self._card())

    async def health(self) -> Response:
        """Whether a request would be answered now; if not, why."""
        status = self._supervisor.status
        counts = {"running": self._supervisor.running, "waiting": self._supervisor.waiting}
        told = {"status": status.name, "reason": status.reason or None, **counts}
        return JSONResponse(told, 200 if status.name == "ok" else 503)

    async def exposition(self) -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _card(self) -> dict[str, Any]:
        facts, limits = dict(self._supervisor.facts), self._settings.limits
        return {
            "id": self._settings.name,
            "object": "model",
            "created": self._born,
            "owned_by": "speculens",
            "max_model_len": facts.get("max_model_len"),
            "speculens": {
                **facts,
                "remote_images": limits.remote_images,
                "limits": {name: getattr(limits, name) for name in ("images", "image_pixels", "image_bytes")},
            },
        }

    def _check_name(self, name: str) -> None:
        own = self._settings.name
        if name != own:
            told = f"There is no model {name[:80]!r} here; this server has {own!r}."
            raise ApiError(404, told, param="model", code="model_not_found")

    def _check(self, body: ChatRequest) -> None:
        limits = self._settings.limits
        self._check_name(body.model)
        if body.choices > limits.choices:
            raise ApiError(400, f"n is at most {limits.choices} here.", param="n")
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        if len(body.urls()) > limits.images:
            raise ApiError(400, f"A request may hold {limits.images} pictures at most.", param="messages")
        if body.baseline and not self._supervisor.facts.get("baseline"):
            raise ApiError(400, "This server runs without a baseline.", param="speculens.baseline")

    async def _first(self, ticket: Ticket, body: ChatRequest) -> Piece:
        """Fetch the pictures, hand the request over, and wait until it is known to be sound: its first piece."""
        limits = self._settings.limits
        self._supervisor.send(
            Ask(
                number=ticket.number,
                messages=await self._messages(body),
                sampling=body.sampling(),
                max_tokens=body.room,
                choices=body.choices,
                seconds=ticket.begun + limits.request_seconds - time.monotonic(),
                steps=body.steps,
                baseline=body.baseline,
            )
        )
        first = await ticket.next()
        self._metrics.first_token.observe(time.monotonic() - ticket.begun)
        return first

    async def _messages(self, body: ChatRequest) -> Messages:
        loop, limits = asyncio.get_running_loop(), self._settings.limits
        deadline = time.monotonic() + limits.image_seconds
        fetched = (  # slow sites hold up no picture that came along
            loop.run_in_executor(self._fetchers if is_remote(url) else None, fetch, url, limits, deadline)
            for url in body.urls()
        )
        try:
            pictures = iter(await asyncio.gather(*fetched))
        except UserError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_image") from None
        return body.turns(lambda: next(pictures))

    async def _pieces(
        self, ticket: Ticket, first: Piece, reply: Reply, request: Request
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of an answer, until all of its choices have ended."""
        piece = first
        while True:
            chunk = reply.take(piece)
            if chunk:
                yield chunk
            request.state.note = f"{reply.id} {reply.prompt_tokens} + {reply.completion_tokens} tokens"
            if reply.done:
                self._metrics.latency.observe(time.monotonic() - ticket.begun)
                return
            piece = await ticket.next()


class _Events(StreamingResponse):
    """Server-sent events. However the stream ends, the request ends with it."""

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


async def _chunks(pieces: AsyncIterator[dict[str, Any]], reply: Reply, *, usage: bool) -> AsyncIterator[str]:
    """An error after the first chunk can no longer be a status: it is the last event."""
    try:
        async for chunk in pieces:
            yield _event(chunk)
        if usage:
            yield _event(reply.usage_chunk())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


async def _exhaust(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; ends it if the client leaves first."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for pending in (task, leaving):
            pending.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _page_files() -> Iterator[tuple[str, bytes, str]]:
    """Path, content and type of each file of the page, read once: no request ever becomes a path."""
    folder = resources.files("speculens.server") / "page"
    if folder.is_dir():
        for file in folder.iterdir():
            kind = TYPES.get(f".{file.name.rpartition('.')[2]}")
            if kind:
                yield "/" if file.name == "index.html" else f"/{file.name}", file.read_bytes(), kind


def _file(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return Response(data, media_type=kind)

    return give


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - registered for it
    return error.response()


async def _invalid(_: Request, error: Exception) -> Response:
    """The first of pydantic's complaints that reaches deepest, without what was sent.

    Where a text or a list may stand, a list that is wrong shall not hear that it is no text.
    """
    assert isinstance(error, RequestValidationError)  # noqa: S101
    vague = ("string_type", "list_type")
    complaint = max(error.errors(), key=lambda complaint: (len(complaint["loc"]), complaint["type"] not in vague))
    names = [str(part) for part in complaint["loc"] if part != "body"]
    place = ".".join(name for name in names if "[" not in name)[:200] or None  # without pydantic's names of types
    told = str(complaint["msg"])[:500]
    return ApiError(400, f"{place}: {told}" if place else told, param=place).response()


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    return ApiError(error.status_code, f"{error.detail}."[:500]).response()


async def _failed(_: Request, error: Exception) -> Response:
    return ApiError(500, f"The server failed on this request ({type(error).__name__}).").response()
