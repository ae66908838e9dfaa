"""The worker process as HTTP sees it: started, spoken to, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from speculens.errors import UserError
from speculens.server.errors import ApiError
from speculens.server.settings import Limits, Model
from speculens.server.wire import Ask, Broken, Cancel, Command, Event, Occupied, Piece, Ready, Refusal, Warming

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a worker that died without having served is started again
TENTHS = 10  # lines in the log about a worker's warm-up
GRACE = 15.0  # seconds after a request's deadline in which the worker must have said so itself


Work: TypeAlias = Callable[[Any, Model, Limits], None]
"""What the worker's process runs: it speaks through a pipe until that ends."""


@dataclass(frozen=True)
class Status:
    """`name` is ok, starting, draining or stopped; the reason is for people."""

    name: str
    reason: str = ""


class Ticket:
    """One request's place in the house, and its mail. Lives on the event loop that opened it."""

    def __init__(self, number: int, places: int, limits: Limits, leave: Callable[[Ticket], None]) -> None:
        self.number, self.places = number, places
        self.begun = time.monotonic()
        self._limits, self._leave = limits, leave
        self._loop = asyncio.get_running_loop()
        self._mail: asyncio.Queue[Piece | ApiError] = asyncio.Queue()

    def post(self, event: Piece | ApiError) -> None:
        """Deliver an event, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, event)
        except RuntimeError:  # the loop is closed, and the client with it
            return

    async def next(self) -> Piece:
        """The next piece. Raises ApiError when there will be none."""
        left = self.begun + self._limits.request_seconds + GRACE - time.monotonic()
        try:
            event = await asyncio.wait_for(self._mail.get(), left)
        except TimeoutError:
            raise ApiError(503, "The worker does not answer.", retry=5) from None
        if isinstance(event, ApiError):
            raise event
        return event

    def close(self) -> None:
        """Nobody waits any more: whatever still runs is cancelled. May be called twice."""
        self._leave(self)

    def _put(self, event: Piece | ApiError) -> None:
        if self._mail.qsize() >= self._limits.backlog:
            while not self._mail.empty():
                self._mail.get_nowait()
            event = ApiError(408, "The client does not read its answer.")
            self.close()
        self._mail.put_nowait(event)


def work(pipe: Any, model: Model, limits: Limits) -> None:
    """In the new process. Only there is torch imported."""
    importlib.import_module("speculens.server.worker").main(pipe, model, limits)


class Supervisor:
    """Keeps one worker alive and brings requests to it. Bounded: `slots + queue` sequences, and not one more."""

    def __init__(
        self, model: Model, limits: Limits, on_event: Callable[[Event], None] = lambda _: None, work: Work = work
    ) -> None:
        self._model, self._limits, self._on_event = model, limits, on_event
        self._start = lambda: _Link(work, model, limits)
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count(1)
        self._status = Status("starting", "the model is loading")
        self._last_words = ""
        self._occupied = 0
        self._facts: Mapping[str, Any] = {}
        self._drain_until: float | None = None
        self._closing = threading.Event()
        self._link: _Link | None = None
        self._keeper: threading.Thread | None = None

    # Life

    def start(self) -> None:
        """Load the model and return when it is there. Raises UserError if it cannot be loaded."""
        link = self._link = self._start()
        while self._status.name != "ok":
            try:
                events = link.receive()
            except EOFError:
                raise UserError(f"The worker died while it loaded the model: {link.fate()}.") from None
            for event in events:
                if isinstance(event, Broken):
                    link.end()
                    link.fate()
                    raise UserError(event.reason)
                self._take(event)
        self._keeper = threading.Thread(target=self._keep, args=(link,), name="speculens-keeper", daemon=True)
        self._keeper.start()

    def drain(self) -> None:
        """Take no more requests; what runs may finish."""
        self._drain_until = time.monotonic() + self._limits.drain_seconds

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    @property
    def drained(self) -> bool:
        """Whether nothing runs any more, or it had its time."""
        return self._drain_until is not None and (not self._tickets or time.monotonic() > self._drain_until)

    def dismiss(self) -> None:
        """Tell those who still wait that the server ends before their answers do."""
        self._end_all(ApiError(503, "The answer was lost: the server has ended.", code="draining", retry=5))

    def stop(self) -> None:
        """End the worker."""
        self._closing.set()
        if self._link:
            self._link.end()
        if self._keeper:
            self._keeper.join(5)

    @property
    def status(self) -> Status:
        return Status("draining", "the server is shutting down") if self.draining else self._status

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the worker tells of its model; that of the last one while a new one loads."""
        return self._facts

    @property
    def process_id(self) -> int | None:
        return self._link.process.pid if self._link else None

    @property
    def running(self) -> int:
        """Slots in use."""
        return self._occupied

    @property
    def waiting(self) -> int:
        """Sequences that were asked for and are not in a slot."""
        return max(sum(ticket.places for ticket in list(self._tickets.values())) - self._occupied, 0)

    # Requests

    def open(self, places: int) -> Ticket:
        """A place for a request of so many sequences. Raises ApiError 400, 503 or 429."""
        house = self._model.slots + self._limits.queue
        if places > house:
            raise ApiError(400, f"n is at most {house} here.", param="n")
        with self._lock:  # or the worker could be lost before the ticket is where all are told of it
            status = self.status
            if status.name != "ok":
                raise ApiError(503, f"The server cannot answer now: {status.reason}.", code=status.name, retry=5)
            taken = sum(ticket.places for ticket in self._tickets.values())
            if taken + places > house:
                raise ApiError(429, f"The queue is full ({taken} sequences): try again.", code="queue_full", retry=1)
            ticket = Ticket(next(self._numbers), places, self._limits, self._leave)
            self._tickets[ticket.number] = ticket
        return ticket

    def send(self, ask: Ask) -> None:
        """Hand a request to the worker; what comes of it arrives at its ticket."""
        if self._link:
            self._link.send(ask)

    def _leave(self, ticket: Ticket) -> None:
        with self._lock:
            known = self._tickets.pop(ticket.number, None)
        if known and self._link:
            self._link.send(Cancel(ticket.number))

    # The keeper's thread

    def _keep(self, link: _Link) -> None:
        pause = FIRST_PAUSE
        while True:
            served = self._listen(link)
            reason = link.fate()
            if self._closing.is_set():
                return
            self._lose(self._last_words or f"the worker {reason}")
            self._last_words = ""
            pause = FIRST_PAUSE if served else min(pause * 2, LONGEST_PAUSE)
            successor = self._replace(pause)
            if successor is None:
                return
            link = self._link = successor
            if self._closing.is_set():  # stop() may have looked at the one before
                link.end()

    def _replace(self, pause: float) -> _Link | None:
        """A new worker, as soon as there can be one; None if the server ends before."""
        while not self._closing.wait(pause):
            try:
                return self._start()
            except (OSError, RuntimeError) as error:  # no process, or no thread: the machine may have some again later
                pause = min(pause * 2, LONGEST_PAUSE)
                log.error("no worker can be started (%s); the next try is in %g seconds", error, pause)  # noqa: TRY400
        return None

    def _listen(self, link: _Link) -> bool:
        """Deliver until the pipe ends; whether the worker ever was ready. One that then falls silent is killed."""
        while True:
            ready = self._status.name == "ok"
            try:
                events = link.receive(self._limits.silent_seconds if ready else None)
            except EOFError:
                return ready
            except SilenceError:
                self._last_words = f"the worker was silent for {self._limits.silent_seconds:g} seconds and was killed"
                link.end()
                continue
            for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Warming(done, total):
                if done * TENTHS // total > (done - 1) * TENTHS // total:
                    log.info("the worker warms up: %d of %d", done, total)
            case Ready(facts):
                self._facts, self._status = facts, Status("ok")
                log.info("the worker is ready")
            case Broken(reason):
                self._last_words = reason
            case Occupied(slots):
                self._occupied = slots
            case Refusal(number, status, message):
                if ticket := self._tickets.get(number):
                    ticket.post(ApiError(status, message, retry=5 if status == 503 else None))
            case Piece():
                if ticket := self._tickets.get(event.number):
                    ticket.post(event)
        self._on_event(event)

    def _lose(self, reason: str) -> None:
        """The worker is gone: tell everybody who waits for it."""
        log.error("%s; a new one is started", reason)
        with self._lock:
            self._status = Status("starting", f"{reason}; a new one is loading")
        self._occupied = 0
        self._end_all(ApiError(503, f"The answer was lost: {reason}.", code="worker_lost", retry=5))

    def _end_all(self, error: ApiError) -> None:
        with self._lock:
            lost = list(self._tickets.values())
        for ticket in lost:
            ticket.post(error)


class SilenceError(Exception):
    """The worker has not said anything for too long."""


class _Link:
    """One worker process and the pipe to it. A thread of its own writes: a full pipe must not stop the event loop."""

    def __init__(self, work: Work, model: Model, limits: Limits) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, model, limits), name="speculens-worker", daemon=True)
        self.process.start()
        theirs.close()
        self._outbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="speculens-writer", daemon=True)
        self._writer.start()

    def send(self, command: Command) -> None:
        self._outbox.put(command)

    def receive(self, seconds: float | None = None) -> list[Event]:
        """The next events; none, if it only shows life. Raises EOFError after its end, SilenceError if it hangs."""
        try:
            if self._pipe.poll(seconds):
                return list(self._pipe.recv())
        except OSError:
            raise EOFError from None
        raise SilenceError

    def fate(self) -> str:
        """How the process ended, once it has. Closes what belonged to it."""
        self.process.join()
        self._outbox.put(None)
        self._writer.join()
        self._pipe.close()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"

    def end(self) -> None:
        """Kill it: it holds nothing that outlives it. The pipe then ends."""
        self.process.kill()

    def _write(self) -> None:
        while (command := self._outbox.get()) is not None:
            with contextlib.suppress(OSError):  # the worker has gone; whoever reads the pipe notices, too
                self._pipe.send(command)
