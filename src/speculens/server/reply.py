"""Pieces in, OpenAI's objects out: the whole answer, or chunk by chunk."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from speculens.server.schema import ChatRequest
from speculens.server.wire import Piece
from speculens.stats import Stats

Run: TypeAlias = tuple[str, bool]


class StopCut:
    """Runs of text without the stop string that ends them: what may be its beginning is held back until it is not."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held: list[Run] = []

    def push(self, runs: Sequence[Run], *, last: bool) -> list[Run]:
        """What is certain now; with the `last` runs, all up to the stop string."""
        self._held += runs
        text = "".join(text for text, _ in self._held)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        end = min(found) if found else len(text) if last else len(text) - self._beginning(text)
        released, self._held = _split(self._held, end)
        return released

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stops), default=0))
        starts = (size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in self._stops))
        return next(starts, 0)


def _split(runs: Sequence[Run], at: int) -> tuple[list[Run], list[Run]]:
    before, after = [], []
    for text, drafted in runs:
        before.append((text[:at], drafted))
        after.append((text[at:], drafted))
        at = max(at - len(text), 0)
    return [run for run in before if run[0]], [run for run in after if run[0]]


@dataclass
class Choice:
    """One answer so far."""

    cut: StopCut
    text: str = ""
    tokens: int = 0
    logprobs: list[Mapping[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats | None = None
    spoken: bool = False


class Reply:
    """The answer to one request, taking shape. `begun` is when it arrived, on the monotonic clock."""

    def __init__(self, model: str, request: ChatRequest, begun: float) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._model, self._request = model, request
        self._created, self._begun = int(time.time()), begun
        self.choices = [Choice(StopCut(request.stops)) for _ in range(request.choices)]
        self.prompt_tokens = 0

    @property
    def done(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    def take(self, piece: Piece) -> dict[str, Any] | None:
        """Add a piece; the chunk to send for it, or None if there is nothing to tell."""
        choice = self.choices[piece.choice]
        runs = choice.cut.push(piece.runs, last=piece.finish_reason is not None)
        text = "".join(text for text, _ in runs)
        choice.text += text
        choice.tokens += piece.tokens
        choice.logprobs += piece.logprobs
        choice.finish_reason, choice.stats = piece.finish_reason, piece.stats
        self.prompt_tokens = piece.prompt_tokens
        if not (text or piece.finish_reason or piece.logprobs or self._request.steps):
            return None
        return self._chunk(piece, choice, runs, text)

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(self.choices)
            ],
            "usage": self.usage(),
            "metrics": self.metrics(),
        }

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for those who asked for it."""
        return {
            **self._head("chat.completion.chunk"),
            "choices": [],
            "usage": self.usage(),
            "metrics": self.metrics(),
        }

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def metrics(self) -> dict[str, Any]:
        """How it was decoded, the passes of all choices pooled."""
        stats = Stats.total(choice.stats for choice in self.choices if choice.stats)
        return {"speculative_decoding": stats.to_dict()}

    def _chunk(self, piece: Piece, choice: Choice, runs: Sequence[Run], text: str) -> dict[str, Any]:
        delta = {"content": text} if choice.spoken else {"role": "assistant", "content": text}
        choice.spoken = True
        chunk = {
            **self._head("chat.completion.chunk"),
            "choices": [
                {
                    "index": piece.choice,
                    "delta": delta,
                    "logprobs": self._logprobs(piece.logprobs),
                    "finish_reason": piece.finish_reason,
                }
            ],
        }
        if self._request.wants_usage:
            chunk["usage"] = None
        elif self.done:
            chunk["metrics"] = self.metrics()
        if self._request.steps:
            chunk["speculens"] = {
                "runs": [{"text": text, "drafted": drafted} for text, drafted in runs],
                "tokens": piece.tokens,
                "accepted": piece.accepted,
                "seconds": time.monotonic() - self._begun,
                "tree": piece.tree,
            }
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _logprobs(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        return {"content": list(entries), "refusal": None} if self._request.logprobs else None
