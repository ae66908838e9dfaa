"""What the two processes say to each other. Neither torch nor HTTP is needed to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from speculens.stats import Stats

Content: TypeAlias = tuple[str | bytes, ...]
Messages: TypeAlias = tuple[tuple[str, Content], ...]
"""Who speaks, and texts and encoded pictures in their order. Bytes, so that a picture can never be a path."""


@dataclass(frozen=True)
class Ask:
    """A request for `choices` answers to one conversation.

    sampling    fields of `Sampling` but `max_new_tokens`; choice i adds i to the seed
    max_tokens  None takes all the room that the prompt leaves
    seconds     until the request is cut
    """

    number: int
    messages: Messages
    sampling: Mapping[str, Any]
    max_tokens: int | None
    choices: int
    seconds: float
    steps: bool = False
    baseline: bool = False


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request any more."""

    number: int


@dataclass(frozen=True)
class Warming:
    """The model is loaded; of what requests will need, so many of so many parts are prepared."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """Requests may come; `facts` are what /v1/models tells of it."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Broken:
    """The worker is about to leave, and why."""

    reason: str


@dataclass(frozen=True)
class Occupied:
    """How many slots are in use now."""

    slots: int


@dataclass(frozen=True)
class Refusal:
    """A request, or what is left of it, ends without an answer."""

    number: int
    status: int
    message: str


@dataclass(frozen=True)
class Piece:
    """What one step brought one choice of a request.

    runs           text by origin: whether it was drafted and kept, or is the target's own
    logprobs       of each emitted token, if asked for: OpenAI's objects
    tree           the step's tree, if asked for
    finish_reason  with the last piece, and `stats` with it; `cancelled` where nobody waits any more
    """

    number: int
    choice: int
    runs: tuple[tuple[str, bool], ...]
    tokens: int
    accepted: int
    prompt_tokens: int
    logprobs: tuple[Mapping[str, Any], ...] = ()
    tree: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    stats: Stats | None = None


Event: TypeAlias = Warming | Ready | Broken | Occupied | Refusal | Piece
Command: TypeAlias = Ask | Cancel
