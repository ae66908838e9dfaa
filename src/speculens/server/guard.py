"""What stands before the application: who may enter, how much a body may weigh, and one line in the log of each answer.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from speculens.server.errors import ApiError, origin_of
from speculens.server.settings import Settings

log = logging.getLogger("speculens.server.access")

GUARDED = ("/v1/", "/metrics", "/openapi.json")  # paths behind the key; the page and /health tell nothing
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """Wraps an application. `on_answer` hears path and status of each answer."""

    def __init__(self, app: ASGIApp, settings: Settings, on_answer: Callable[[str, int], None]) -> None:
        self._app, self._on_answer = app, on_answer
        self._limits = settings.limits
        self._key = settings.api_key.encode() if settings.api_key else None
        self._hosts = {"localhost", settings.host.lower()} if is_loopback(settings.host) else None
        self._held = 0  # bytes of all bodies that arrive or are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, weight = time.monotonic(), 0, 0
        scope["state"] = {}

        async def weighed() -> Message:
            """What comes next, counted at once: a body that never ends is held, too."""
            nonlocal weight
            message = await receive()
            size = len(message.get("body", b""))
            weight += size
            self._held += size
            self._weigh(weight, beside=self._held - weight)
            return message

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            body = await self._body(headers, weighed)
            await self._app(scope, _again(body, receive), answer)
        except Gone:
            status = 499
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Exception as error:  # noqa: BLE001 - a traceback in the log could quote the request
            log.error("failed: %s at %s", type(error).__name__, origin_of(error))  # noqa: TRY400
            if not status:
                await ApiError(500, "The server failed on this request.").response()(scope, receive, answer)
        finally:
            self._held -= weight
            path = str(scope["path"])
            self._on_answer(path, status)
            note = scope["state"].get("note", "")
            log.info("%s %s %d %.3fs %s", scope["method"], ascii(path[:80]), status, time.monotonic() - begun, note)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if _splits(host) else None
        if self._hosts is not None and not (name and (name in self._hosts or is_loopback(name))):
            # A page elsewhere whose name was made to point here would otherwise be this server's own page.
            raise ApiError(403, "This server answers to names of this machine only; start it with --host for others.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, "Pages of another origin may not use this server.")
        if self._key is not None and str(scope["path"]).startswith(GUARDED):
            given = headers.get("authorization", "")
            scheme, _, key = given.partition(" ")
            if not hmac.compare_digest(key.strip().encode(), self._key) or scheme.lower() != "bearer":
                raise ApiError(401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it, however it is sent. Raises ApiError 413, 408 or 429."""
        announced = headers.get("content-length", "0")
        self._weigh(int(announced) if announced.isdecimal() and len(announced) < 20 else 0, beside=self._held)
        data = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    data += message.get("body", b"")
                    if not message.get("more_body", False):
                        return bytes(data)
        except TimeoutError:
            raise ApiError(408, "The request's body did not arrive in time.") from None

    def _weigh(self, size: int, beside: int) -> None:
        """Whether so large a body may be held beside the bytes of the others. Raises ApiError 413 or 429."""
        limits = self._limits
        if size > limits.body_bytes:
            raise ApiError(413, f"The request is larger than {limits.body_bytes:,} bytes.", code="too_large")
        if beside + size > limits.body_bytes * limits.bodies:
            raise ApiError(429, "Too many large requests are being answered: try again.", code="queue_full", retry=1)


class Gone(BaseException):
    """The client has left: nobody is to be answered. Not an Exception, so that nobody makes an answer of it."""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _splits(host: str) -> bool:
    try:
        return urlsplit(f"//{host}").hostname is not None
    except ValueError:
        return False


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what really comes: the client's leaving."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
