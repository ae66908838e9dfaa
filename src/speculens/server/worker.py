"""The process that computes: one engine on one thread, and threads beside it that read pictures.

Between two steps it listens, and forgets what nobody waits for any more. The engine takes prompts in a piece at a
time, so that steps are short, and something is said after each: a worker that hangs is known by its silence. An
exception of one request is that request's; one of a step is the end of the process, which the supervisor notices.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from transformers.utils import logging as transformers_logging

from speculens.answer import runs
from speculens.checkpoints import load_drafter
from speculens.conversation import Conversation
from speculens.conversation import Message as Turn
from speculens.drafters.base import reshaped
from speculens.engine import Engine, slot_rows
from speculens.errors import UserError, lacks_memory
from speculens.pictures import load_image
from speculens.sampling import Logprob, Sampling
from speculens.server.errors import origin_of
from speculens.server.settings import Limits, Model
from speculens.server.wire import Ask, Broken, Cancel, Event, Occupied, Piece, Ready, Refusal, Warming
from speculens.slot import Slot, Step
from speculens.targets import Prompt, Target, load_target
from speculens.text import TextStream, spell
from speculens.tree import DraftTree

log = logging.getLogger(__name__)

READERS = 2  # threads that decode pictures
LOWEST = -9999.0  # for minus infinity, which JSON lacks; OpenAI's number
SEEDS = 1 << 64
BEAT = 1.0  # seconds of silence, if no step is longer


def main(pipe: Any, model: Model, limits: Limits) -> None:
    """Serve a pipe until its other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides what ends when
        signal.signal(number, signal.SIG_IGN)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        engine, alone = load(model)
        if model.warm_up:
            with _memory_for(*_slots(model, engine.target, engine.capacity)):
                warm_up(engine, alone, lambda done, total: pipe.send([Warming(done, total)]))
        pipe.send([Ready(facts(model, engine))])
        Worker(pipe, engine, alone, limits).run()
    except UserError as error:
        pipe.send([Broken(" ".join(str(error).split()))])
    except (BrokenPipeError, ConnectionResetError):  # the parent has gone
        return
    except BaseException as error:
        pipe.send([Broken(f"the engine failed ({type(error).__name__})")])
        raise


def load(model: Model) -> tuple[Engine, Engine | None]:
    """The engine, and the one without a drafter if it is wanted. Raises UserError."""
    with _memory_for(f"the weights of {model.target}", "give --dtype bfloat16 or spread them by --device-map auto"):
        target = load_target(
            model.target, dtype=model.dtype, device=model.device, device_map=model.device_map, revision=model.revision
        )
        drafter = load_drafter(model.drafter, dtype=target.dtype, device=target.device, target=target)
    rows, chunk = slot_rows(model.length, target.context), model.prefill_chunk
    with _memory_for(*_slots(model, target, rows)):
        engine = Engine(
            target,
            drafter,
            slots=model.slots,
            capacity=rows,
            shape="auto" if model.sized else reshaped(drafter, model.tree),
            prefill_chunk=chunk,
            capture=model.capture,
        )
        alone = (
            Engine(target, slots=1, capacity=rows, prefill_chunk=chunk, capture=model.capture)
            if model.baseline
            else None
        )
    return engine, alone


@contextmanager
def _memory_for(what: str, remedy: str) -> Iterator[None]:
    """A block that may need more memory than there is. Raises UserError then: for what, and what would help."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"There is not enough memory for {what}: {remedy}.") from None


def _slots(model: Model, target: Target, rows: int) -> tuple[str, str]:
    """What the slots hold, and how to hold less."""
    size = target.session(slots=1, capacity=1).nbytes * rows * (model.slots + model.baseline) / 2**30
    alone = ", or add --no-baseline" if model.baseline else ""
    return (
        f"{model.slots} slots of {rows:,} rows ({size:,.2f} GiB of keys and values)",
        f"lower --max-num-seqs or --max-model-len{alone}",
    )


def give_back() -> None:
    """Hand freed memory to the system. glibc keeps it, hundreds of MiB after large pictures, until it is told to."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and need none
        if trim:
            trim(0)


def warm_up(engine: Engine, alone: Engine | None, progress: Callable[[int, int], None]) -> None:
    """Record what requests will need before the first one comes; nothing where steps are not recorded."""
    for each in filter(None, (engine, alone)):
        each.warm_up(progress=progress)


def facts(model: Model, engine: Engine) -> dict[str, Any]:
    """What clients may know of the model."""
    described = engine.drafter.describe()
    return {
        "family": engine.target.family,
        "drafter": engine.drafter.name,
        "tree": {**described.get("tree", {}), **model.tree},
        "sized": model.sized,
        "max_model_len": engine.capacity,
        "slots": engine.slots,
        "baseline": model.baseline,
    }


@dataclass(eq=False)
class Request:
    """A request on its way. `left` counts the choices that have not ended; at 0 it is forgotten."""

    ask: Ask
    deadline: float
    over: bool = False
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.ask.choices


@dataclass(frozen=True, eq=False)
class Choice:
    """One of a request's answers, waiting in the engine or running."""

    request: Request
    number: int
    slot: Slot
    words: TextStream


@dataclass(eq=False)
class Lane:
    """An engine, and the choices that it was given and has not ended."""

    engine: Engine
    choices: dict[Slot, Choice] = field(default_factory=dict)


Item: TypeAlias = tuple[Request, Prompt | Refusal] | Cancel | None
"""What the other threads tell the engine's: a request that was read or cannot be, one to forget, or the end."""


class Worker:
    """Steps the engines and tells the pipe what they say."""

    def __init__(self, pipe: Any, engine: Engine, alone: Engine | None, limits: Limits) -> None:
        self._pipe, self._limits = pipe, limits
        self._drafting, self._alone = Lane(engine), Lane(alone) if alone else None
        self._lanes = [lane for lane in (self._drafting, self._alone) if lane]
        self._target: Target = engine.target
        self._requests: dict[int, Request] = {}
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._events: list[Event] = []
        self._occupied = 0
        self._tidy = False  # whether nothing has happened since memory was given back
        self._spoken = 0.0  # when something was sent last
        self._encoding = threading.Lock()  # tokenizers do not like to be shared
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="speculens-reader")

    def run(self) -> None:
        """Until the pipe's other end closes."""
        threading.Thread(target=self._hear, name="speculens-ear", daemon=True).start()
        try:
            while self._listen():
                self._cut_late()
                for lane in self._lanes:
                    for step in lane.engine.step():
                        self._tell(lane, step)
                self._report()
        finally:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def _report(self) -> None:
        occupied = sum(len(lane.engine.running) for lane in self._lanes)
        if occupied != self._occupied:
            self._occupied = occupied
            self._events.append(Occupied(occupied))
        now = time.monotonic()
        if self._events or now >= self._spoken + BEAT:
            self._pipe.send(self._events)
            self._events, self._spoken = [], now

    # The other threads

    def _hear(self) -> None:
        while True:
            try:
                command = self._pipe.recv()
            except (EOFError, OSError):
                self._inbox.put(None)
                return
            if isinstance(command, Ask):
                request = Request(command, time.monotonic() + command.seconds)
                self._requests[command.number] = request
                self._readers.submit(self._read, request)
            else:
                self._inbox.put(command)

    def _read(self, request: Request) -> None:
        """Pictures and words to a prompt, beside the running engine."""
        number = request.ask.number
        try:
            if request.over:
                return
            turns = tuple(Turn(role, tuple(map(self._part, content))) for role, content in request.ask.messages)
            with self._encoding:
                prompt = self._target.encode(Conversation(turns))
            self._inbox.put((request, prompt))
        except Exception as error:  # noqa: BLE001 - whatever a picture or a processor does is this request's affair
            self._inbox.put((request, _refusal(number, error)))

    def _part(self, part: str | bytes) -> Any:
        limits = self._limits
        if isinstance(part, str):
            return part
        return load_image(part, max_pixels=limits.image_pixels, max_bytes=limits.image_bytes)

    # The engine's thread

    def _listen(self) -> bool:
        """Take in what has arrived; wait a beat for it if there is nothing to do. False when the pipe has ended."""
        idle = not any(lane.choices for lane in self._lanes)
        while True:
            try:
                item = self._inbox.get(block=idle, timeout=BEAT)
            except queue.Empty:
                if idle and not self._tidy:
                    give_back()
                    self._tidy = True
                return True
            idle = self._tidy = False
            match item:
                case None:
                    return False
                case Cancel(number):
                    if request := self._requests.get(number):
                        self._forget(request)
                case (request, Refusal() as refusal):
                    self._refuse(request, refusal)
                case (request, prompt):
                    self._submit(request, prompt)

    def _submit(self, request: Request, prompt: Prompt) -> None:
        lane, ask = self._alone if request.ask.baseline else self._drafting, request.ask
        if request.over:
            return
        if lane is None:
            self._refuse(request, Refusal(ask.number, 400, "This server runs without a baseline."))
            return
        try:
            for number in range(ask.choices):
                slot = lane.engine.submit(prompt, self._sampling(lane.engine, ask, number, prompt))
                lane.choices[slot] = Choice(request, number, slot, TextStream(self._target.tokenizer))
        except Exception as error:  # noqa: BLE001 - the engine is as it was before
            self._refuse(request, _refusal(ask.number, error))

    @staticmethod
    def _sampling(engine: Engine, ask: Ask, number: int, prompt: Prompt) -> Sampling:
        room = max(engine.capacity - len(prompt), 1)
        seed = (ask.sampling["seed"] + number + SEEDS // 2) % SEEDS - SEEDS // 2
        return Sampling(**{**ask.sampling, "seed": seed, "max_new_tokens": ask.max_tokens or room})

    def _tell(self, lane: Lane, step: Step) -> None:
        choice = lane.choices.get(step.slot)
        if choice is None:  # another choice of its request failed in the same step
            return
        request, tokenizer = choice.request, self._target.tokenizer
        if step.slot.error:
            self._refuse(request, _refusal(request.ask.number, step.slot.error))
            return
        finish = step.slot.finish_reason
        self._events.append(
            Piece(
                number=request.ask.number,
                choice=choice.number,
                runs=tuple((run.text, run.drafted) for run in runs(choice.words, step)),
                tokens=len(step.tokens),
                accepted=step.accepted,
                prompt_tokens=len(step.slot.prompt),
                logprobs=tuple(_named(tokenizer, entry) for entry in step.logprobs),
                tree=picture(tokenizer, step.tree, step.tokens[: step.accepted])
                if request.ask.steps and step.tree
                else None,
                finish_reason=finish,
                stats=step.slot.stats if finish else None,
            )
        )
        if finish:
            self._leave(lane, choice)

    def _cut_late(self) -> None:
        """End what has had its time: what runs keeps what it has, what waits is refused."""
        now = time.monotonic()
        for lane in self._lanes:
            for choice in [choice for choice in lane.choices.values() if choice.request.deadline < now]:
                if choice.slot.tokens:
                    self._cut(lane, choice)
        for request in list(self._requests.values()):  # another thread adds to it
            if request.deadline < now:
                late = "No slot was free before the request's time was up."
                self._refuse(request, Refusal(request.ask.number, 503, late))

    def _cut(self, lane: Lane, choice: Choice) -> None:
        lane.engine.cancel(choice.slot)
        self._events.append(_end(choice, "length"))
        self._leave(lane, choice)

    def _leave(self, lane: Lane, choice: Choice) -> None:
        del lane.choices[choice.slot]
        choice.request.left -= 1
        if choice.request.left == 0:
            self._forget(choice.request)

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        if not request.over:
            self._events.append(refusal)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """Take a request out of everything; its slots are free from now on."""
        request.over = True
        self._requests.pop(request.ask.number, None)
        for lane in self._lanes:
            for choice in [choice for choice in lane.choices.values() if choice.request is request]:
                del lane.choices[choice.slot]
                lane.engine.cancel(choice.slot)
                if choice.slot.tokens:  # nobody reads it, but its passes count
                    self._events.append(_end(choice, "cancelled"))


def _end(choice: Choice, reason: str) -> Piece:
    """The last piece of a choice that ends between two steps."""
    slot, number = choice.slot, choice.request.ask.number
    return Piece(number, choice.number, (), 0, 0, len(slot.prompt), finish_reason=reason, stats=slot.stats)


def _refusal(number: int, error: Exception) -> Refusal:
    """What a request is told that failed. Of our own mistakes, or the model's, the log tells where, and never more."""
    if isinstance(error, UserError):
        return Refusal(number, 400, " ".join(str(error).split()))
    if lacks_memory(error):
        return Refusal(number, 503, "There is not enough memory for this prompt now.")
    log.error("request %d failed: %s at %s", number, type(error).__name__, origin_of(error))
    return Refusal(number, 500, f"The model failed on this request ({type(error).__name__}).")


def picture(tokenizer: Any, tree: DraftTree, kept: list[int]) -> Mapping[str, Any]:
    """A tree of one slot for the eyes: pieces of text, parents, and the nodes of the accepted path, the root first.

    kept  the drafted tokens that were emitted
    """
    tokens, parents, path = tree.outline(kept)
    return {"tokens": [spell(tokenizer, token)[0] for token in tokens], "parents": parents, "accepted": path}


def _named(tokenizer: Any, entry: Logprob) -> dict[str, Any]:
    """OpenAI's object of one token."""
    one = {**_priced(tokenizer, entry.token, entry.logprob)}
    return one | {"top_logprobs": [_priced(tokenizer, token, logprob) for token, logprob in entry.top]}


def _priced(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    text, data = spell(tokenizer, token)
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(data)}
