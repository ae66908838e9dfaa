"""The server's parts without a server: addresses of pictures, stop strings, the draft options, the likelihoods."""

from __future__ import annotations

import http.server
import itertools
import socket
import ssl
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from speculens import Conversation, Engine, LookupDrafter, Sampling, UserError
from speculens.cli.serve import speculation
from speculens.server import images
from speculens.server.images import fetch, is_public, public_address
from speculens.server.reply import StopCut
from speculens.server.settings import Limits
from speculens.targets import Target

REMOTE = Limits(remote_images=True, image_bytes=1000, image_seconds=1.0)


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
        fetch(f"http://{host}/a.png", REMOTE)


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
        fetch(url, REMOTE)


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"H")
                self.server.stopped.wait(0.1)
        else:
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"x" * (2000 if self.path == "/large" else 10))

    def log_message(self, form, *arguments):  # noqa: ANN002 - as its base has it
        pass


@pytest.fixture
def site(monkeypatch):
    """A web server of this machine, which the look-up takes for a public one under the name `open.example` alone."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.stopped = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    real = images.public_address
    monkeypatch.setattr(
        images, "public_address", lambda host, port: "127.0.0.1" if host == "open.example" else real(host, port)
    )
    yield f"http://open.example:{server.server_port}"
    server.stopped.set()
    server.shutdown()
    server.server_close()


def test_a_picture_comes_from_the_address_that_was_checked(site):
    assert fetch(f"{site}/a.png", REMOTE) == b"x" * 10
    assert fetch(f"{site}/to/{site}/a.png", REMOTE) == b"x" * 10


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none", "answered 404"),
        ("/large", "larger than 1,000"),
        ("/slow", "within 1 seconds"),
        ("/to/http://127.0.0.1/", "not a public address"),
        ("/to/file:///etc/passwd", "not a plain"),
        ("/to/http://[::ffff:127.0.0.1]/", "not a public address"),
    ],
)
def test_a_picture_that_cannot_be_had_says_why(site, path, reason):
    with pytest.raises(UserError, match=reason):
        fetch(site + path, REMOTE)


def test_redirects_are_counted(site, monkeypatch):
    monkeypatch.setattr(images, "urljoin", lambda url, _: url)
    with pytest.raises(UserError, match="3 redirects"):
        fetch(f"{site}/to/x", REMOTE)


def test_certificates_are_checked(site):
    assert ssl.create_default_context().check_hostname
    with pytest.raises(UserError, match=r"could not be fetched|did not arrive"):
        fetch(site.replace("http:", "https:"), REMOTE)


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


@pytest.mark.parametrize("config", ["{", "[]", '{"draft": 1}', '{"method": "eagle"}', '{"num_speculative_tokens": 0}'])
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
