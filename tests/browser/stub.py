"""A server that says what it is told to: the contract of the page without a model, with all that can go wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

PAGE = Path(__file__).parents[2] / "src" / "speculens" / "server" / "page"
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Pass = tuple[Sequence[str], str]
"""Drafted and kept tokens, then the target's own."""

ANSWER: Sequence[Pass] = (
    ((), "The"),
    ((" chart", " shows"), " the"),
    ((" rain", "fall", " of", " four"), " towns"),
    ((".",), " <b>Ael"),
    ((), "mere"),
    ((" had", " the", " most", ",", " 82", " mm"), ","),
    ((" and", " Bron", " & "), "Cole"),
    ((" the", " least"), ".\n"),
    (("The", " two", " others", " lie", " between", " them", ",", " close"), " to"),
    ((" each",), " other"),
    ((), "."),
)
OTHER = (*ANSWER[:-2], ((" one",), " another"), ANSWER[-1])
"""The same up to its last words."""

ERRORS = {
    400: "The picture is no PNG, JPEG, WebP or GIF.",
    401: "This server needs an API key: send it as a bearer token.",
    429: "All slots and all places in the queue are taken.",
    500: "The worker stopped.",
}
MODEL = {
    "id": "testbed-llava",
    "object": "model",
    "speculens": {
        "family": "llava",
        "drafter": "eaglevlm",
        "tree": {"num_steps": 5, "topk": 4, "num_draft_tokens": 24},
        "max_model_len": 2048,
        "baseline": True,
        "remote_images": False,
        "limits": {"images": 3, "image_pixels": 1_000_000, "image_bytes": 2_000_000},
    },
}


def text_of(passes: Sequence[Pass]) -> str:
    """The text of an answer."""
    return "".join("".join((*kept, own)) for kept, own in passes)


def tree_of(root: str, kept: Sequence[str]) -> dict[str, Any]:
    """The accepted path and a token below its end; beside each of these two guesses, one of which goes on."""
    tokens, parents, accepted = [root], [-1], [0]

    def grow(token: str, parent: int) -> int:
        tokens.append(token)
        parents.append(parent)
        return len(tokens) - 1

    for depth, token in enumerate((*kept, " never")):
        above = accepted[-1]
        node = grow(token, above)
        grow(" longer-than-most-tokens-are", grow(f" guess{depth}", above))
        grow("\n", above)
        if depth < len(kept):
            accepted.append(node)
    return {"tokens": tokens, "parents": parents, "accepted": accepted}


@dataclass
class Script:
    """What the stub does next.

    status   of the answer; an error's has the error body
    passes   what it says, and `other` what it says without drafter
    pace     seconds before each chunk with drafter; three times that without
    cut      break the connection after so many chunks
    fail     send an error as an event after so many chunks
    key      wanted as a bearer token
    model    what /v1/models says
    """

    status: int = 200
    passes: Sequence[Pass] = ANSWER
    other: Sequence[Pass] = ANSWER
    pace: float = 0.0
    cut: int | None = None
    fail: int | None = None
    key: str = ""
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)


class Stub(ThreadingHTTPServer):
    """Listens on a free port of the loopback device."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = Script()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """The page's files, /v1/models and /v1/chat/completions."""

    @property
    def script(self) -> Script:
        return cast(Stub, self.server).script

    def log_message(self, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        """Files by name, and the model."""
        if self.path == "/v1/models":
            if self.allowed():
                self.json(200, {"object": "list", "data": [self.script.model]})
            return
        file = PAGE / (self.path.removeprefix("/") or "index.html")
        if file.parent != PAGE or not file.is_file():
            self.json(404, {"error": {"message": "There is no such page."}})
            return
        self.reply(200, KINDS[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        """An answer, or what the script has instead."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.script.asked.append(body)
        if not self.allowed():
            return
        if self.script.status != 200:
            self.error(self.script.status)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for data in self.events(baseline=body["speculens"]["baseline"]):
                self.wfile.write(f"data: {data}\n\n".encode())
        except ConnectionError:
            self.script.left.set()
        self.close_connection = True

    def events(self, *, baseline: bool) -> Iterator[str]:
        script = self.script
        passes = script.other if baseline else script.passes
        chunks = list(self.chunks(single(passes) if baseline else passes))
        for number, chunk in enumerate(chunks):
            if number == script.cut:
                return
            if number == script.fail:
                yield json.dumps({"error": {"message": ERRORS[500], "type": "server_error"}})
                return
            time.sleep(script.pace * (3 if baseline else 1))
            yield json.dumps(chunk)
        yield "[DONE]"

    def chunks(self, passes: Sequence[Pass]) -> Iterator[dict[str, Any]]:
        begun = time.perf_counter()
        root = ""
        for number, (kept, own) in enumerate(passes):
            runs = [{"text": "".join(kept), "drafted": True}] if kept else []
            step = {
                "runs": [*runs, {"text": own, "drafted": False}],
                "tokens": len(kept) + 1,
                "accepted": len(kept),
                "seconds": time.perf_counter() - begun + 0.01 * (number + 1),
                "tree": tree_of(root, kept) if number else None,
            }
            ending = "stop" if number == len(passes) - 1 else None
            choice = {"index": 0, "delta": {"content": "".join((*kept, own))}, "finish_reason": ending}
            yield head() | {"choices": [choice], "speculens": step, "usage": None}
            root = own
        yield head() | {
            "choices": [],
            "metrics": {"speculative_decoding": figures(passes)},
            "usage": {"prompt_tokens": 40, "completion_tokens": 40, "total_tokens": 80},
        }

    def allowed(self) -> bool:
        if not self.script.key or self.headers["Authorization"] == f"Bearer {self.script.key}":
            return True
        self.error(401)
        return False

    def error(self, status: int) -> None:
        self.json(status, {"error": {"message": ERRORS[status], "type": "error", "code": status}})

    def json(self, status: int, body: dict[str, Any]) -> None:
        self.reply(status, "application/json", json.dumps(body).encode())

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        if status == 429:
            self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(body)


def single(passes: Sequence[Pass]) -> Sequence[Pass]:
    """The same text a token a pass, as without drafter."""
    return [((), token) for kept, own in passes for token in (*kept, own)]


def head() -> dict[str, Any]:
    """What every chunk begins with."""
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL["id"]}


def figures(passes: Sequence[Pass]) -> dict[str, Any]:
    """The figures of measures; the first pass is the prefill's and counts in none."""
    counts = [len(kept) for kept, _ in passes[1:]]
    return {
        "mean_acceptance_length": sum(counts) / len(counts) + 1,
        "mean_accepted_tokens": sum(counts) / len(counts),
        "num_drafts": len(counts),
        "num_accepted_tokens": sum(counts),
    }
