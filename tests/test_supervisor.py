"""The worker's life as its supervisor sees it, with workers that load no model: killed, silent, warming up, broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import psutil
import pytest

from speculens.errors import UserError
from speculens.server.errors import ApiError
from speculens.server.settings import Limits, Model
from speculens.server.supervisor import Supervisor
from speculens.server.wire import Ask, Broken, Piece, Ready, Warming

BEAT, SILENT = 0.2, 2.0


def sound(pipe, model, limits):  # noqa: ARG001 - as the supervisor calls it
    """A worker that warms up for longer than it may be silent later, and answers every request with one token."""
    for done in range(1, 21):
        pipe.send([Warming(done, 20)])
    time.sleep(SILENT + 0.5 if model.target == "slow" else 0)
    pipe.send([Ready({"pid": os.getpid()})])
    while True:
        if not pipe.poll(BEAT):
            pipe.send([])
        elif isinstance(command := pipe.recv(), Ask):
            if command.steps:  # the sign to hang
                time.sleep(1000)
            pipe.send([Piece(command.number, 0, (("Yes.", False),), 1, 0, 3, finish_reason="stop")])


def broken(pipe, model, limits):  # noqa: ARG001
    pipe.send([Warming(1, 2)])
    pipe.send([Broken("There is no model here.")])


def mute(pipe, model, limits):  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def started(request):
    supervisor = Supervisor(Model(getattr(request, "param", "x")), Limits(silent_seconds=SILENT), work=sound)
    supervisor.start()
    yield supervisor
    supervisor.stop()


async def asked(supervisor, *, hang=False):
    ticket = supervisor.open(1)
    supervisor.send(Ask(ticket.number, (), {}, None, 1, 60.0, steps=hang))
    try:
        return await ticket.next()
    finally:
        ticket.close()


def until_ok(supervisor, other_than):
    """Wait for a new worker."""
    for _ in range(600):
        if supervisor.status.name == "ok" and supervisor.facts["pid"] != other_than:
            return
        time.sleep(0.05)
    raise AssertionError(supervisor.status)


def test_a_killed_worker_is_told_and_replaced(started):
    first = started.process_id

    async def meet():
        ticket = started.open(1)
        psutil.Process(first).kill()
        with pytest.raises(ApiError, match="was killed by SIGKILL") as lost:
            await ticket.next()
        ticket.close()
        assert lost.value.status == 503
        with pytest.raises(ApiError, match="a new one is loading") as refused:
            started.open(1)
        assert (refused.value.status, started.status.name) == (503, "starting")
        until_ok(started, first)
        assert (await asked(started)).finish_reason == "stop"

    asyncio.run(meet())


def test_a_worker_that_hangs_is_killed_and_replaced(started):
    first = started.process_id

    async def meet():
        with pytest.raises(ApiError, match="the worker was silent for 2 seconds and was killed") as lost:
            await asked(started, hang=True)
        assert lost.value.status == 503
        until_ok(started, first)
        assert not psutil.pid_exists(first)
        assert (await asked(started)).finish_reason == "stop"

    asyncio.run(meet())


def test_a_machine_that_cannot_start_a_worker_is_asked_again(started, monkeypatch, caplog):
    monkeypatch.setattr("speculens.server.supervisor.FIRST_PAUSE", 0.05)
    first, start = started.process_id, started._start
    faults = iter([OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")])

    def starved():
        for fault in faults:
            raise fault
        return start()

    started._start = starved
    psutil.Process(first).kill()
    until_ok(started, first)
    assert asyncio.run(asked(started)).finish_reason == "stop"
    told = [record.getMessage() for record in caplog.records if "can be started" in record.getMessage()]
    assert [line.rpartition("in ")[2] for line in told] == ["0.1 seconds", "0.2 seconds"]


def test_whoever_comes_while_the_worker_dies_is_told():
    """The keeper learns of it just before a ticket is entered."""
    supervisor = Supervisor(Model("x"), Limits())
    supervisor._take(Ready({}))
    lock = supervisor._lock

    @contextlib.contextmanager
    def dying():
        supervisor._lock = lock
        supervisor._lose("the worker died")
        with lock:
            yield

    async def meet():
        supervisor._lock = dying()
        with pytest.raises(ApiError, match="the worker died"):
            await asyncio.wait_for(supervisor.open(1).next(), 1)

    asyncio.run(meet())


def test_what_will_never_fit_is_not_told_to_come_back():
    supervisor = Supervisor(Model("x", slots=2), Limits(queue=1))
    supervisor._take(Ready({}))

    async def meet():
        with pytest.raises(ApiError, match="n is at most 3") as never:
            supervisor.open(4)
        supervisor.open(3)
        with pytest.raises(ApiError, match="full") as later:
            supervisor.open(1)
        assert [(told.value.status, told.value.retry) for told in (never, later)] == [(400, None), (429, 1)]

    asyncio.run(meet())


@pytest.mark.parametrize("started", ["slow"], indirect=True)
def test_one_that_loads_or_has_nothing_to_do_is_left_in_peace(started):
    first = started.process_id
    time.sleep(SILENT * 1.5)
    assert (started.status.name, started.process_id) == ("ok", first)
    assert (asyncio.run(asked(started))).finish_reason == "stop"


@pytest.mark.parametrize(("work", "told"), [(broken, "no model here"), (mute, "was killed by SIGKILL")])
def test_a_worker_that_cannot_begin_ends_the_server(work, told):
    supervisor = Supervisor(Model("x"), Limits(), work=work)
    with pytest.raises(UserError, match=told):
        supervisor.start()
    supervisor.stop()
