"""Trouble for a running server, on this machine only: odd inputs, rude clients, and a look at what is left of it.

    speculens serve testbed/weights/qwen2_5_vl --drafter lookup --served-model-name small --port 8000
    python -m benchmarks.load http://127.0.0.1:8000 --fuzz 20000
    python -m benchmarks.load http://127.0.0.1:8000 --seconds 300 --clients 16

`--fuzz` sends inputs that are drawn from a seed and expects 200, or 4xx with a reason. `--seconds` lets clients ask,
stream, leave in the middle and send nonsense, all at once. After either, processes, slots, file descriptors and memory
must be those of before; memory but for `SPARE_MIB`. Figures are JSON, the verdict is a line on standard error.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import httpx
import psutil
from PIL import Image

JSON = {"content-type": "application/json"}
ODD = (
    None, True, False, 0, -1, 1 << 70, 1e308, "", "x", "\0", "\ud800", "é" * 40, [], {}, [[]], [None], {"": None},
    "file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/", "data:", "data:,", "data:image/png;base64,!!",
)  # fmt: skip
SPARE_MIB = 16  # for what a rare visit was the first to need
PATIENCE = 660.0  # seconds; more than a server's for a request, so that only what is lost times out
QUIET_SECONDS = 8  # a connection is kept for five, a worker gives memory back after one
FIRST_SECONDS, FIRST_INPUTS = 10.0, 200  # before anything is judged: threads and buffers are made when first needed
FIELDS = (
    "n", "stop", "seed", "top_p", "top_k", "min_p", "temperature", "max_tokens", "logprobs", "top_logprobs", "stream",
    "stream_options", "repetition_penalty", "no_repeat_ngram_size", "ignore_eos", "response_format", "tools", "user",
    "speculens", "unknown",
)  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """One input: what kind it is, the bytes of the body, its headers, and what it is drawn from."""

    kind: str
    body: bytes
    headers: dict[str, str]
    name: str = ""


def troubles(seed: int, numbers: Iterable[int], model: str) -> Iterator[Trouble]:
    """Inputs that are the same for the same seed: pictures and JSON, each hurt in one of many ways."""
    for number in numbers:
        yield replace(trouble(random.Random(f"{seed}/{number}"), model), name=f"input {seed}/{number}")


def trouble(draw: random.Random, model: str) -> Trouble:
    """One of them."""
    kind = draw.choice([*PICTURES, "mutated json", "odd field", "bytes", "headers", "deep"])
    headers = JSON
    if kind in PICTURES:
        data = dumped(asked(model, PICTURES[kind](draw)))
    elif kind == "mutated json":
        data = dumped(mutated(draw, asked(model, sound(draw))))
    elif kind == "odd field":
        data = dumped({**asked(model), draw.choice(FIELDS): draw.choice(ODD)})
    elif kind == "bytes":
        data = flipped(draw, dumped(asked(model, sound(draw))))
    elif kind == "headers":
        data = dumped(asked(model))
        headers = {"content-type": draw.choice(["text/plain", "application/xml", "", "application/json; charset=x"])}
    else:
        data = b"[" * draw.randint(1, 100_000) if draw.random() < 0.5 else b'{"a":' * draw.randint(1, 100_000)
    return Trouble(kind, data, headers)


def asked(model: str, *pictures: bytes) -> dict[str, Any]:
    """A sound request for two tokens."""
    kind = "data:image/png;base64,"
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": kind + base64.b64encode(picture).decode()}} for picture in pictures
    ]
    parts.append({"type": "text", "text": "What is this?"})
    return {"model": model, "max_tokens": 2, "temperature": 0, "messages": [{"role": "user", "content": parts}]}


def dumped(value: Any) -> bytes:
    """JSON, with lone surrogates escaped and NaN spelled as Python does."""
    return json.dumps(value).encode()


# ---- pictures


def sound(draw: random.Random) -> bytes:
    """A small picture in some format."""
    size = draw.randint(1, 96), draw.randint(1, 96)
    mode = draw.choice(["RGB", "RGBA", "L", "P", "1", "LA", "I;16", "CMYK", "F"])
    picture = Image.new(mode, size)
    formats = {"RGB": "WEBP JPEG GIF BMP TIFF PNG PPM", "CMYK": "JPEG TIFF", "F": "TIFF"}
    data = io.BytesIO()
    picture.save(data, draw.choice(formats.get(mode, "PNG").split()))
    return data.getvalue()


def truncated(draw: random.Random) -> bytes:
    """Cut somewhere."""
    data = sound(draw)
    return data[: draw.randrange(len(data))]


def flipped(draw: random.Random, data: bytes | None = None) -> bytes:
    """A few bits turned over."""
    hurt = bytearray(data or sound(draw))
    for _ in range(draw.randint(1, 8)):
        hurt[draw.randrange(len(hurt))] ^= 1 << draw.randrange(8)
    return bytes(hurt)


def bomb(draw: random.Random) -> bytes:
    """A PNG of a few bytes that claims, or has, far more pixels than anybody needs."""
    side = draw.choice([8000, 30_000, 60_000, (1 << 31) - 1])
    rows = zlib.compress(bytes(1 << 20), 9) * draw.randint(1, 3)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
            (b"IDAT", rows),
            (b"IEND", b""),
        )
    )


def thin(draw: random.Random) -> bytes:
    """One row or column of pixels."""
    data = io.BytesIO()
    length = draw.randint(2, 5000)
    Image.new("L", draw.choice([(1, length), (length, 1)])).save(data, "PNG")
    return data.getvalue()


def noise(draw: random.Random) -> bytes:
    """No picture at all, or the beginning of one in a format that is not read."""
    return draw.choice([b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"RIFF\0\0\0\0WEBP"]) + draw.randbytes(40)


PICTURES = {
    "sound": sound,
    "truncated": truncated,
    "flipped": flipped,
    "bomb": bomb,
    "thin": thin,
    "noise": noise,
}


# ---- JSON


def mutated(draw: random.Random, value: Any) -> Any:
    """The same tree with one or two of its nodes replaced, dropped or doubled."""
    for _ in range(draw.randint(1, 2)):
        value = _mutated_once(draw, value)
    return value


def _mutated_once(draw: random.Random, value: Any) -> Any:
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    if isinstance(value, dict):
        key = draw.choice(list(value))
        if draw.random() < 0.15:
            return {name: child for name, child in value.items() if name != key}
        return {**value, key: _mutated_once(draw, value[key])}
    index = draw.randrange(len(value))
    if draw.random() < 0.15:
        return value + [value[index]] * draw.randint(1, 12)
    return [*value[:index], _mutated_once(draw, value[index]), *value[index + 1 :]]


# ---- what is expected

Outcome: TypeAlias = tuple[Counter[str], list[str]]
"""How many inputs of each kind had which status, and what went wrong."""


def fault(response: httpx.Response) -> str | None:
    """Why an answer is not one that a server may give; None if it is."""
    if response.status_code in (200, 429):
        return None
    if not 400 <= response.status_code < 500:
        return f"status {response.status_code}: {response.text[:200]}"
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code} without a reason: {response.text[:200]}"
    return None if isinstance(message, str) and message else "an empty reason"


def fuzz(client: httpx.Client, inputs: Iterable[Trouble]) -> Outcome:
    """Send them one by one."""
    seen: Counter[str] = Counter()
    faults = []
    for item in inputs:
        try:
            response = client.post("/v1/chat/completions", content=item.body, headers=item.headers)
        except httpx.HTTPError as error:
            faults.append(f"{item.name}, {item.kind}: {type(error).__name__} {error}")
            continue
        seen[f"{item.kind}: {response.status_code}"] += 1
        wrong = fault(response)
        if wrong:
            faults.append(f"{item.name}, {item.kind}: {wrong}")
    return seen, faults


def fuzz_together(client: httpx.Client, inputs: Sequence[Iterable[Trouble]]) -> Outcome:
    """Send several rows of them at once."""
    with ThreadPoolExecutor(len(inputs)) as crowd:
        outcomes = list(crowd.map(partial(fuzz, client), inputs))
    return sum((seen for seen, _ in outcomes), Counter()), [fault for _, faults in outcomes for fault in faults]


# ---- load


def client_for(url: str, seed: int, model: str, until: float, seen: Counter[str], faults: list[str]) -> None:
    """One client: asks, streams, leaves in the middle, sends nonsense and large pictures, until the time is up."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        kind = draw.choice(["ask", "stream", "leave", "leave", "trouble", "huge"])
        with httpx.Client(base_url=url, timeout=PATIENCE) as http:
            try:
                seen[f"{kind}: {_visit(http, draw, kind, model, faults)}"] += 1
            except httpx.HTTPError as error:
                faults.append(f"{kind}: {type(error).__name__} {error}")


def _visit(http: httpx.Client, draw: random.Random, kind: str, model: str, faults: list[str]) -> int:
    path = "/v1/chat/completions"
    request = {
        **asked(model, sound(draw)),
        "max_tokens": draw.randint(1, 48),
        "temperature": 1,
        "seed": draw.randint(0, 9),
    }
    if kind in {"stream", "leave"}:
        with http.stream("POST", path, json={**request, "stream": True}) as response:
            last = ""
            for number, line in enumerate(response.iter_lines()):
                last = line or last
                if kind == "leave" and number >= draw.randint(0, 6):
                    return response.status_code
        if response.status_code != 200 or last != "data: [DONE]":
            faults.append(f"a stream of status {response.status_code} ended with {last[:200]}")
        return response.status_code
    if kind == "trouble":
        item = trouble(draw, model)
        response = http.post(path, content=item.body, headers=item.headers)
    else:
        response = http.post(path, json={**asked(model, huge(draw)), "max_tokens": 4} if kind == "huge" else request)
    wrong = fault(response)
    if wrong:
        faults.append(f"{kind}: {wrong}")
    return response.status_code


def huge(draw: random.Random) -> bytes:
    """Some 36 million pixels in few bytes."""
    data = io.BytesIO()
    Image.new("1", (6000, 6000 + draw.randint(0, 9))).save(data, "PNG")
    return data.getvalue()


def crowd(url: str, model: str, clients: int, seconds: float, seed: int) -> Outcome:
    """Many clients at once."""
    seen: Counter[str] = Counter()
    faults: list[str] = []
    until = time.monotonic() + seconds
    threads = [
        threading.Thread(target=client_for, args=(url, seed + number, model, until, seen, faults))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen, faults


# ---- before and after


def processes(port: int) -> list[psutil.Process]:
    """The server that listens there, and its workers."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            server = psutil.Process(connection.pid)
            return [server, *server.children(recursive=True)]
    return []


def footprint(port: int) -> dict[str, Any]:
    """What the server's processes hold."""
    found = processes(port)
    return {
        "processes": [process.pid for process in found],
        "threads": sum(process.num_threads() for process in found),
        "file_descriptors": sum(process.num_fds() for process in found),
        "resident_mib": sum(process.memory_info().rss for process in found) >> 20,
    }


def rest(http: httpx.Client) -> dict[str, Any]:
    """Wait for the server to be idle; its last word if it never is."""
    health: dict[str, Any] = {}
    for _ in range(600):
        health = http.get("/health").json()
        if health["status"] == "ok" and health["running"] == health["waiting"] == 0:
            break
        time.sleep(0.1)
    time.sleep(QUIET_SECONDS)
    return health


def around(url: str, first: Callable[[], Outcome], trouble: Callable[[], Outcome]) -> dict[str, Any]:
    """A server before and after some trouble."""
    port = urlsplit(url).port or 80
    with httpx.Client(base_url=url, timeout=60) as http:
        _, early = first()
        rest(http)
        before, begun = footprint(port), time.monotonic()
        seen, faults = trouble()
        seconds = round(time.monotonic() - begun)
        health = rest(http)
        after = footprint(port)
    faults = [*early, *faults, *leaks(health, before, after)]
    told = {"seen": dict(sorted(seen.items())), "seconds": seconds, "faults": faults}
    return {**told, "health": health, "before": before, "after": after}


def leaks(health: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """How a server at rest differs from what it was."""
    found = [f"{health[name]} still {name}" for name in ("running", "waiting") if health[name]]
    if after["processes"] != before["processes"]:  # one that died has been replaced
        found.append(f"processes: {before['processes']} before, {after['processes']} after")
    for name, spare in (("file_descriptors", 0), ("resident_mib", SPARE_MIB)):
        if after[name] > before[name] + spare:
            found.append(f"{name}: {before[name]} before, {after[name]} after")
    return found


def verdict(told: dict[str, Any]) -> str:
    """The outcome in one line."""
    statuses: Counter[str] = Counter()
    for name, count in told["seen"].items():
        statuses[name.rpartition(" ")[2]] += count
    answers = ", ".join(f"{count:,} of {status}" for status, count in sorted(statuses.items()))
    before, after = told["before"], told["after"]
    return (
        f"{len(told['faults'])} faults in {statuses.total():,} answers ({answers}) and {told['seconds']:,} seconds; "
        f"before and after: memory {before['resident_mib']:,} and {after['resident_mib']:,} MiB, "
        f"file descriptors {before['file_descriptors']} and {after['file_descriptors']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The script: prints JSON, and returns 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", help="of a server on this machine")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="send N odd inputs")
    parser.add_argument("--seconds", type=float, default=0, help="let clients come and go for so long")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    url, seed, clients = options.url, options.seed, min(options.clients, 64)
    if urlsplit(url).hostname not in {"127.0.0.1", "localhost", "::1"}:
        parser.error("only a server on this machine may be troubled")
    faults: list[str] = []
    with httpx.Client(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=clients)) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]

        def inputs(count: float, seed: int) -> Outcome:
            rows = [range(first, min(int(count), 100_000), clients) for first in range(clients)]
            return fuzz_together(http, [troubles(seed, row, model) for row in rows])

        def visits(seconds: float, seed: int) -> Outcome:
            return crowd(url, model, clients, min(seconds, 900), seed)

        for amount, first, trouble in ((options.fuzz, FIRST_INPUTS, inputs), (options.seconds, FIRST_SECONDS, visits)):
            if amount:
                told = around(url, partial(trouble, first, seed + 1000), partial(trouble, amount, seed))
                print(json.dumps(told))
                print(verdict(told), file=sys.stderr)
                faults += told["faults"]
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
