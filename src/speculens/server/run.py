"""A whole server from its settings: the port, the worker, the application, and a quiet end."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from speculens.errors import UserError
from speculens.server.app import create_app
from speculens.server.guard import is_loopback
from speculens.server.metrics import Metrics
from speculens.server.settings import Settings
from speculens.server.supervisor import Supervisor

log = logging.getLogger(__name__)

CLOSING_SECONDS = 5  # for answers that are written but not yet taken


def serve(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` is told the address. Raises UserError if it cannot begin."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    door = _door(settings)
    metrics = Metrics()
    supervisor = Supervisor(settings.model, settings.limits, metrics.count)
    try:
        supervisor.start()
        if settings.api_key is None and not is_loopback(settings.host):
            log.warning("everybody who reaches %s may use this server: give it an --api-key", settings.host)
        host, port = door.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            create_app(settings, supervisor, metrics),
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.limits.connections,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        _Server(config, supervisor, lambda: on_ready(address)).run([door])
    finally:
        supervisor.stop()
        door.close()


class _Server(uvicorn.Server):
    """The first signal drains: what runs may finish, what comes is told 503. The second ends at once."""

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._supervisor, self._on_ready = supervisor, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._supervisor.draining:
            super().handle_exit(sig, frame)
        else:
            self._supervisor.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._supervisor.dismiss()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or self._supervisor.drained
        return await super().on_tick(counter)


def _door(settings: Settings) -> socket.socket:
    """The bound port, before the model is loaded: that takes minutes, and a taken port should be told at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        door = socket.socket(family, socket.SOCK_STREAM)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(address)
        except OSError:
            door.close()
            raise
    except OSError as error:
        raise UserError(f"{settings.host}:{settings.port} cannot be served: {error.strerror}.") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it; the system drops those that take nothing
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.limits.stall_seconds * 1000))
    return door
