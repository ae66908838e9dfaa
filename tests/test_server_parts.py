"""The server's parts without a server: addresses of pictures, stop strings, the draft options, the likelihoods."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import socket
import ssl
import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from pydantic import ValidationError
from starlette.responses import JSONResponse

import tiny
from speculens import Conversation, Engine, LookupDrafter, Sampling, UserError
from speculens.cli.serve import speculation
from speculens.server import app, images
from speculens.server.guard import Guard
from speculens.server.images import is_public, public_address
from speculens.server.metrics import Metrics
from speculens.server.reply import StopCut
from speculens.server.schema import ChatRequest
from speculens.server.settings import Limits, Model, Settings
from speculens.server.supervisor import Supervisor
from speculens.targets import Target

CHECKED = ssl.create_default_context
REMOTE = Limits(remote_images=True, image_bytes=1000, image_seconds=1.0)


def fetch(url):
    return images.fetch(url, REMOTE, time.monotonic() + REMOTE.image_seconds)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.1", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "fec0::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:db8::1", "::7f00:1",
        "nonsense",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_open_internet_is_known(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_a_public_address_is_known(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "[::1]", "0"])
def test_other_spellings_of_this_machine_are_refused(host):
    with pytest.raises(UserError, match=r"not a public address|not known|not a plain"):
        fetch(f"http://{host}/a.png")


def test_a_name_with_one_private_address_is_refused(monkeypatch):
    found = [(0, 0, 0, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UserError, match="not a public address"):
        public_address("two.example", 80)


@pytest.mark.parametrize(
    "url",
    ["http://user:secret@8.8.8.8/", "http://8.8.8.8:99999/", "http:///x", "http://8.8.8.8/\r\nx: y", "http://é.x/"],
)
def test_an_address_that_is_not_plain_is_refused(url):
    with pytest.raises(UserError, match="not a plain"):
        fetch(url)


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path.startswith("/slow"):
            self.trickle({"/slow/head": b"", "/slow/body": b"\r\n", "/slow/counted": b"Content-Length: 100\r\n\r\n"})
        elif self.path == "/short":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
        else:
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"x" * (2000 if self.path == "/large" else 10))

    def trickle(self, heads):
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + heads[self.path])
            for _ in range(100):
                self.wfile.write(b"x")
                self.server.stopped.wait(0.1)
            self.server.ended.append(self.path)

    def log_message(self, form, *arguments):  # noqa: ANN002 - as its base has it
        pass


def anonymous(protocol):
    """TLS without certificates: its two ends need no file."""
    context = ssl.SSLContext(protocol)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH:@SECLEVEL=0")
    return context


@pytest.fixture(params=["http", "https"])
def site(request, monkeypatch):
    """A web server of this machine, which the look-up takes for a public one under the name `open.example` alone."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.stopped, server.ended = threading.Event(), []  # `ended`: pages that somebody waited ten seconds for
    if request.param == "https":
        server.socket = anonymous(ssl.PROTOCOL_TLS_SERVER).wrap_socket(server.socket, server_side=True)
        monkeypatch.setattr(ssl, "create_default_context", lambda: anonymous(ssl.PROTOCOL_TLS_CLIENT))
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    real = images.public_address
    monkeypatch.setattr(
        images, "public_address", lambda host, port: "127.0.0.1" if host == "open.example" else real(host, port)
    )
    yield f"{request.param}://open.example:{server.server_port}"
    waited_for = list(server.ended)
    server.stopped.set()
    server.shutdown()
    server.server_close()
    assert waited_for == []


def test_a_picture_comes_from_the_address_that_was_checked(site):
    assert fetch(f"{site}/a.png") == b"x" * 10
    assert fetch(f"{site}/to/{site}/a.png") == b"x" * 10


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none", "answered 404"),
        ("/large", "larger than 1,000"),
        ("/slow/head", "within 1 seconds"),
        ("/slow/body", "within 1 seconds"),
        ("/slow/counted", "within 1 seconds"),
        ("/short", "could not be fetched"),
        ("/to/http://127.0.0.1/", "not a public address"),
        ("/to/file:///etc/passwd", "not a plain"),
        ("/to/http://[::ffff:127.0.0.1]/", "not a public address"),
    ],
)
def test_a_picture_that_cannot_be_had_says_why(site, path, reason):
    with pytest.raises(UserError, match=reason):
        fetch(site + path)


def test_redirects_are_counted(site, monkeypatch):
    monkeypatch.setattr(images, "urljoin", lambda url, _: url)
    with pytest.raises(UserError, match="3 redirects"):
        fetch(f"{site}/to/x")


@pytest.mark.parametrize("site", ["https"], indirect=True)
def test_certificates_are_checked(site, monkeypatch):
    assert CHECKED().check_hostname
    monkeypatch.setattr(ssl, "create_default_context", CHECKED)
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(site)


def test_who_waited_too_long_for_its_turn_is_not_even_looked_up(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(UserError, match="did not arrive within 1 seconds"):
        images.fetch("http://open.example/", REMOTE, time.monotonic())


def test_slow_sites_hold_up_no_picture_that_came_along_and_share_one_deadline(monkeypatch):
    came, deadlines = threading.Event(), set()

    def fetch(url, _, deadline):
        deadlines.add(deadline)
        if url.startswith("data:"):
            came.set()
        return b"x" if came.wait(30) else b""

    monkeypatch.setattr(app, "fetch", fetch)
    desk = app._Desk(Settings(Model("x"), REMOTE, "x"), Supervisor(Model("x"), REMOTE), Metrics())
    urls = [f"http://open.example/{number}" for number in range(app.FETCHERS + 1)] + ["data:,x"]
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = ChatRequest(model="x", messages=[{"role": "user", "content": pictures}])
    ((_, content),) = asyncio.run(desk._messages(body))
    assert content == (b"x",) * len(urls)
    assert len(deadlines) == 1
    desk._fetchers.shutdown()


def test_bodies_that_still_arrive_are_held_as_well():
    """Fifty clients that send most of a body and then nothing: two of them fit, and only until they leave."""

    async def answered_by(scope, receive, send):
        await JSONResponse({})(scope, receive, send)

    limits, told = Limits(body_bytes=100, bodies=2), asyncio.Queue()
    settings = Settings(Model("x"), limits, "x", host="open.example")
    guard = Guard(answered_by, settings, lambda _, status: told.put_nowait(status))

    async def upload(sizes, end):
        pieces = [{"type": "http.request", "body": b"x" * size, "more_body": True} for size in sizes]

        async def receive():
            return pieces.pop(0) if pieces else await end()

        async def send(_):
            pass

        await guard({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)

    async def meet():
        gone = asyncio.Event()

        async def left():
            told.put_nowait("stalled")
            await gone.wait()
            return {"type": "http.disconnect"}

        async def over():
            return {"type": "http.request", "body": b"x" * 10}

        crowd = [asyncio.create_task(upload([49, 50], left)) for _ in range(50)]
        assert Counter([await told.get() for _ in crowd]) == {429: 48, "stalled": 2}
        gone.set()
        await asyncio.wait(crowd)
        for size in (90, 91, 90):
            await upload([size], over)
        assert [told.get_nowait() for _ in range(5)] == [499, 499, 200, 413, 200]

    asyncio.run(meet())


def asked(message=(), **fields):  # noqa: ANN003 - fields of a request
    """A request that continues an answer of a client's library."""
    turns = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes.", **dict(message)}]
    return ChatRequest(model="x", messages=turns, **fields)


def test_what_libraries_send_without_a_meaning_is_taken():
    empty = ChatCompletionMessage(role="assistant", content="Yes.").model_dump()
    assert set(empty) == {"role", "content", "refusal", "annotations", "audio", "function_call", "tool_calls"}
    assert asked(empty).turns(bytes)[1] == ("assistant", ("Yes.",))
    for name in set(CompletionCreateParamsBase.__annotations__) - {"model", "messages"}:
        asked(**{name: None})
    for name, value in NEUTRAL.items():
        asked(**{name: value})


NEUTRAL = {"function_call": "none", "min_tokens": 0, "reasoning_effort": "none", "verbosity": "medium"}
MEANT = {
    "function_call": {"name": "f"}, "min_tokens": 3, "reasoning_effort": "low", "verbosity": "high",
    "prediction": {"type": "content", "content": "x"}, "web_search_options": {}, "audio": {"voice": "x"},
    "moderation": {"model": "x"},
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_what_would_change_the_answer_is_refused_by_name(name):
    with pytest.raises(ValidationError, match=rf"{name}\n.*does not support it"):
        asked(**{name: MEANT[name]})


@pytest.mark.parametrize("name", ["annotations", "audio", "function_call", "tool_calls"])
def test_an_answer_with_calls_or_sound_in_it_cannot_be_continued(name):
    with pytest.raises(ValidationError, match=name):
        asked({name: [{"type": "x"}]})


def test_what_load_generators_send_reaches_the_sampling():
    told = asked(ignore_eos=True, no_repeat_ngram_size=3).sampling()
    assert (told["ignore_eos"], told["no_repeat_ngram_size"]) == (True, 3)
    plain = Sampling(**asked(temperature=0, seed=0).sampling())
    assert plain == Sampling()
    for size in (-1, 65):
        with pytest.raises(ValidationError, match="no_repeat_ngram_size"):
            asked(no_repeat_ngram_size=size)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_never_shows_however_the_text_arrives(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    cut, told = StopCut(stops), ""
    ends = [text.find(stop) for stop in stops if stop in text]
    for number, piece in enumerate(pieces):
        told += "".join(text for text, _ in cut.push([(piece, True)], last=number == len(pieces) - 1))
    if not ends:
        assert told == text
    elif len(pieces) == 1:  # the engine stops at the first stop string: nothing comes after the piece that holds it
        assert told == text[: min(ends)]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ('{"method": "ngram", "num_speculative_tokens": 4}', ("lookup", 5)),
        ('{"method": "eagle", "model": "runs/x"}', ("runs/x", None)),
        ('{"model": "runs/x", "num_speculative_tokens": 1}', ("runs/x", 2)),
    ],
)
def test_vllms_draft_options_count_the_root(config, named):
    assert speculation(config, None) == named


@pytest.mark.parametrize(
    "config",
    [
        "{", "[]", '{"draft": 1}', '{"method": "eagle"}', '{"num_speculative_tokens": 0}',
        '{"method": "ngram", "num_speculative_tokens": true}',
    ],
)  # fmt: skip
def test_broken_draft_options_are_refused(config):
    with pytest.raises(UserError):
        speculation(config, None)
    with pytest.raises(UserError, match="give one of them"):
        speculation("{}", "lookup")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}], ids=str)
def test_logprobs_are_the_targets_own_with_any_drafter(sampling):
    """Node by node in a tree or one by one: the same tokens with the same likelihoods, and summing to one."""
    target = Target(tiny.model("llava"), tiny.processor("llava"))
    everything = Sampling(**sampling, max_new_tokens=24, logprobs=target.vocab_size)
    told = []
    for drafter in (None, LookupDrafter()):
        steps = Engine(target, drafter).stream(Conversation.user("Go on and on and on."), everything)
        told.append([entry for step in steps for entry in step.logprobs])
    assert [entry.token for entry in told[0]] == [entry.token for entry in told[1]]
    for one, other in zip(*told, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert dict(one.top)[one.token] == one.logprob
        values = torch.tensor([value for _, value in one.top], dtype=torch.float64)
        assert float(values.exp().sum()) == pytest.approx(1, abs=1e-5)
