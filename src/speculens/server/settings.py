"""What a server is told once, at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Model:
    """What the worker loads, and how much of it runs side by side.

    drafter   folder, hub id, or the name of one that needs no weights
    tree      changes of the drafter's own tree: num_steps, topk, num_draft_tokens
    sized     choose each step's tree by cost and acceptance instead
    length    tokens of prompt and answer to make room for; None: what the model can look at, at most 4,096
    slots     sequences that run side by side
    baseline  also keep an engine without a drafter, of one slot, for requests that ask for it
    capture   whether a GPU's steps are recorded; `off`: never
    warm_up   prepare what requests will need before the first one comes
    prefill_chunk  rows of a prompt that are taken in between two steps of those that run
    """

    target: str
    drafter: str = "none"
    tree: Mapping[str, int] = field(default_factory=dict)
    sized: bool = False
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    capture: Literal["auto", "off"] = "auto"
    revision: str | None = None
    length: int | None = None
    slots: int = 8
    baseline: bool = True
    warm_up: bool = True
    prefill_chunk: int = 512


@dataclass(frozen=True)
class Limits:
    """How much one request, and all of them together, may ask for.

    queue            sequences that may wait for a slot
    request_seconds  from the arrival of a request to its last token
    body_bytes       of one request; `body_seconds` for its arrival
    bodies           how many of the largest bodies may be held at a time, as bytes in all
    images           pictures in one request, each of `image_bytes` and `image_pixels`; `image_seconds` to fetch all
    remote_images    follow http(s) addresses of pictures, to public places only
    choices          `n` of a request
    backlog          events that may wait for a client that does not read; then it is dropped
    stall_seconds    the system closes a connection that takes nothing for so long
    drain_seconds    after SIGTERM, for what runs
    silent_seconds   a worker that says nothing for so long hangs, and is started again
    connections      open at a time
    """

    queue: int = 32
    request_seconds: float = 600.0
    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    bodies: int = 16
    images: int = 8
    image_bytes: int = 20 * 2**20
    image_pixels: int = 40 * 2**20
    image_seconds: float = 20.0
    remote_images: bool = False
    choices: int = 16
    backlog: int = 4096
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0
    silent_seconds: float = 300.0
    connections: int = 512


@dataclass(frozen=True)
class Settings:
    """A whole server. `name` is what clients call the model; an `api_key` of None asks for none."""

    model: Model
    limits: Limits
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
