"""The loop: draft, score, choose, follow, keep. Slots are admitted and freed between steps.

Every emitted token is the target's own choice given its prefix. The drafter only decides how many come at once.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from speculens.capture import Recorder, column_bucket, row_bucket
from speculens.conversation import Conversation
from speculens.costs import Costs, Stopwatch, Store
from speculens.drafters.base import Drafter, NoDrafter
from speculens.errors import UserError
from speculens.features import Features
from speculens.loop import Bucket, Corrected, Loop, Outcome
from speculens.ops import send
from speculens.plan import NO_DRAFT, PATIENCE, ROOMY, Pinned, Plan, Planner, ladder
from speculens.sampling import Logprob, Needs, Sampling, choose, correct, likelihoods
from speculens.slot import Generation, Slot, Step
from speculens.targets.base import Prompt, Target
from speculens.text import TextStream
from speculens.tree import DraftTree, TreeShape

WARM = (Sampling(), Sampling(temperature=1.0))  # what `warm_up` prepares for


@dataclass(frozen=True)
class _Round:
    """A step that was given to the device.

    slots     whose it is, by row
    outcome   what comes of it
    part      of the loop, that waiting for it is charged to
    ordinary  nothing was recorded for it
    """

    slots: Sequence[Slot]
    outcome: Outcome
    part: str
    ordinary: bool


class _Taken(NamedTuple):
    """What one slot, a row of a round, took of it."""

    slot: Slot
    row: slice
    tokens: list[int]
    drafted: int
    logprobs: tuple[Logprob, ...]


class Engine:
    """Runs one target with one drafter, as they are when it is made: who changes a model makes a new engine.

    slots     sequences that run side by side
    capacity  rows of KV cache per slot: prompt and output; None takes the model's context, at most 4,096. More than the
              context is a UserError
    shape     draft tree; None takes the drafter's own; `auto` sizes each step's by cost and acceptance (`plan.py`); or
              any other Plan
    timed     run part by part, never as a graph, and wait for the device around each: `Stats.seconds` is then true on a
              GPU, of eager steps (costs speed there)
    prefill_chunk  rows of a submitted prompt that are filled in between two steps of the running slots; None: all
    capture   `auto`: on one CUDA device, steps are recorded as graphs and replayed; `off`: they never are
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        slots: int = 1,
        capacity: int | None = None,
        shape: TreeShape | Plan | Literal["auto"] | None = None,
        timed: bool = False,
        prefill_chunk: int | None = None,
        capture: Literal["auto", "off"] = "auto",
    ) -> None:
        self.target, self.drafter = target, drafter or NoDrafter()
        self.slots = slots
        self.capacity = slot_rows(capacity, target.context)
        self._recorded = capture == "auto" and not timed and target.device.type == "cuda"
        self._plan = self._planned(shape)
        largest = self._plan.shapes[-1]
        self._drafter = self.drafter.session(target, slots, self.capacity, largest)
        # Drafted nodes are scored above the committed rows.
        self._target = target.session(slots, self.capacity + self._drafter.nodes)
        self.prefill_chunk = prefill_chunk
        self._running: list[Slot] = []
        self._waiting: deque[Slot] = deque()
        self._filling: tuple[Slot, Generator[None, None, tuple[Tensor, Features]]] | None = None
        # Until the next probe, if the drafter has room for as many rows at once.
        self._patience = min(PATIENCE, largest.scratch) if largest else 1
        self._put_off = 0  # steps whose tokens the drafter has not observed yet
        self._loop = Loop(self._target, self._drafter, slots, target.device, self._patience)
        self._recorder = Recorder(self._loop.step, self._loop.state if self._recorded else None)
        self._under_way: _Round | None = None
        self._stopwatch = Stopwatch(target.device if self._recorder.on else torch.device("cpu"))  # of the newest round
        self._synchronize = torch.cuda.synchronize if timed and target.device.type == "cuda" else None

    @property
    def running(self) -> Sequence[Slot]:
        """Slots in row order."""
        return tuple(self._running)

    @property
    def pending(self) -> Sequence[Slot]:
        """Submitted requests that do not run yet, the next one first."""
        return (*([self._filling[0]] if self._filling else []), *self._waiting)

    @property
    def replays(self) -> int:
        """Steps that ran as recorded graphs; the others ran one kernel at a time."""
        return self._recorder.replays

    @property
    def kv_bytes(self) -> dict[str, int]:
        """Bytes of keys and values of target and drafter: held from the start, whatever runs."""
        return {"target": self._target.nbytes, "drafter": self._drafter.nbytes}

    # One request

    def generate(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Generation:
        """Decode one request to its end."""
        return self.generate_all([request], [sampling or Sampling()])[0]

    def stream(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Generator[Step, None, None]:
        """Decode one request step by step. Leaving the iterator early cancels it."""
        self._check_idle()
        step = self.admit(request, sampling)
        try:
            yield step
            while step.slot.finish_reason is None:
                step = next(s for s in self.step() if s.slot is step.slot)
                yield step
        finally:
            self.cancel(step.slot)

    def generate_all(
        self,
        requests: Sequence[Conversation | Prompt],
        samplings: Sequence[Sampling] | Sampling | None = None,
        on_step: Callable[[int, Step], None] | None = None,
    ) -> list[Generation]:
        """Decode many requests over the slots, admitting the next whenever one is free. Results in order."""
        self._check_idle()
        if not isinstance(samplings, Sequence):
            samplings = [samplings or Sampling()] * len(requests)
        waiting = deque(enumerate(zip(requests, samplings, strict=True)))
        numbers: dict[Slot, int] = {}
        report = on_step or (lambda *_: None)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.slots:
                    number, (request, sampling) = waiting.popleft()
                    step = self.admit(request, sampling)
                    numbers[step.slot] = number
                    report(number, step)
                for step in self.step():
                    report(numbers[step.slot], step)
        finally:
            for slot in list(numbers):
                self.cancel(slot)
        done = sorted(numbers, key=numbers.__getitem__)
        return [slot.generation for slot in done]

    # Slots

    def admit(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Step:
        """Prefill a request into a free slot at once and choose its first token.

        Raises UserError if it cannot fit, RuntimeError if no slot is free or submitted requests wait for one.
        """
        if len(self._running) == self.slots:
            raise RuntimeError(f"all {self.slots} slots are running")
        if self.pending:
            raise RuntimeError(f"{len(self.pending)} submitted requests are waiting: submit this one, too")
        slot = self._slot(request, sampling)
        with self._clock("prefill", [slot]):
            logits, features = self._target.prefill(slot.prompt)
            return self._begin(slot, logits, features)

    def submit(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Slot:
        """Queue a request. `step` fills it in when a slot is free, a piece at a time, and brings its first token.

        Raises UserError if it cannot fit. What goes wrong later ends this slot alone: `error` says what it was.
        """
        slot = self._slot(request, sampling)
        self._waiting.append(slot)
        return slot

    def step(self) -> list[Step]:
        """One round for every running slot, and after it a piece of a submitted prompt, if a slot is free for it.

        Where steps are graphs, the round may be under way since the last call: then a slot that was admitted in between
        waits for the next one.
        """
        steps = self._advance() if self._running else []
        if self._can_fill:
            steps += self._fill()
        return steps

    def warm_up(self, samplings: Sequence[Sampling] = WARM, progress: Callable[[int, int], None] | None = None) -> None:
        """Record every graph that requests of such settings will need; nothing on a CPU, `timed` or with `capture` off.

        Passes over short prompts are recorded here and nowhere else, also beside a drafter whose steps cannot be.

        samplings  settings by kind: greedy, with or without each filter; a batch may hold one kind or all of them
        progress   called after each graph with how many are done, and how many there are
        """
        self._check_idle()
        if not (self._recorded or self._recorder.on):
            return
        self._target.rehearse()
        # Prompts also where steps are not recorded: engines of one target should round alike.
        buckets = self._buckets(samplings) if self._recorder.on else []
        recordings: list[Callable[[], bool]] = [partial(self._recorder.ready, bucket) for bucket in buckets]
        recordings += self._target.recordings(self._recorder.place)
        for done, record in enumerate(recordings, 1):
            record()
            if progress:
                progress(done, len(recordings))

    def cancel(self, slot: Slot) -> None:
        """End a slot now; its row is free for the next request. Does nothing if it has ended already."""
        if slot.finish_reason is None:
            slot.finish_reason = "cancelled"
            if slot in self._waiting:
                self._waiting.remove(slot)
            elif self._filling and self._filling[0] is slot:
                self._filling[1].close()
                self._filling = None
            self._leave()

    # Inside

    def _advance(self) -> list[Step]:
        """End a round. The device is given the next one before text is made of this one and the caller has it."""
        round_, self._under_way = self._under_way, None
        if round_ is None or all(slot.finish_reason for slot in round_.slots):
            round_ = self._begin_round()
        taken = self._end_round(round_)
        self._leave()
        if self._may_hurry:
            self._under_way = self._begin_round()
        return [
            Step(one.slot, one.tokens, one.slot.say(), one.drafted, round_.outcome.tree.rows(one.row), one.logprobs)
            for one in taken
        ]

    @property
    def _may_hurry(self) -> bool:
        """Whether a next round can be launched at once: none that looks at a row's past, and prompts go first."""
        past = any(slot.sampling.needs_history for slot in self._running)
        return bool(self._running) and self._recorder.on and not past and not self._can_fill

    @property
    def _can_fill(self) -> bool:
        return bool(self.pending) and len(self._running) < self.slots

    def _slot(self, request: Conversation | Prompt, sampling: Sampling | None) -> Slot:
        sampling = sampling or Sampling()
        prompt = request if isinstance(request, Prompt) else self.target.encode(request)
        self._check_room(prompt, sampling)
        tokenizer = self.target.tokenizer
        return Slot(prompt, sampling, TextStream(tokenizer, sampling.stop) if tokenizer else None)

    def _fill(self) -> list[Step]:
        """One piece of the first submitted prompt; a Step if that was its last."""
        if self._filling is None:
            slot = self._waiting.popleft()
            self._filling = slot, self._target.pieces(slot.prompt, self.prefill_chunk)
        slot, pieces = self._filling
        with self._clock("prefill", [slot]):
            try:
                next(pieces)
                return []
            except StopIteration as end:
                self._filling = None
                try:
                    return [self._begin(slot, *end.value)]
                except Exception as error:  # noqa: BLE001 - kept for whoever submitted it
                    return [self._fail(slot, error)]
            except Exception as error:  # noqa: BLE001 - the same
                self._filling = None
                return [self._fail(slot, error)]

    def _fail(self, slot: Slot, error: Exception) -> Step:
        slot.finish_reason, slot.error = "error", error
        return Step(slot, [], "", 0, None)

    def _begin(self, slot: Slot, logits: Tensor, features: Features) -> Step:
        """Let a prompt that the target has taken in run: its first token.

        Nothing waits for the device before that token is read, so the drafter's launches hide behind the target's pass.
        """
        row = len(self._running)
        try:
            self._loop.front.prepare(row, slot.sampling)
            first, logits = self._first(slot, logits, row, send(features.tokens[:, -1], logits.device))
            slot.stats.add_prompt(len(slot.prompt), int(slot.prompt.image.sum()))
            if begun := self._drafter.begin(features, first):
                slot.stats.add_view(begun.rows, begun.notes)
        except BaseException:
            self._target.free(row)
            raise
        self._loop.front.admit(row, first)
        self._running.append(slot)
        emitted = slot.take(first.tolist(), self.target.eos_token_ids)
        self._leave()
        return Step(slot, emitted, slot.say(), 0, None, likelihoods(logits[0], slot.sampling, emitted))

    def _begin_round(self) -> _Round:
        """Give the device a step of all running slots, as a graph where that is possible. Nothing is read back."""
        slots, recorded = list(self._running), self._recorder.captures
        self._stopwatch.start()
        bucket = self._bucket(slots)
        self._put_off = (0 if bucket.catch_up else self._put_off) + (not bucket.drafts)
        corrected = self._correction(slots)
        if corrected is None and self._recorder.ready(bucket):
            part = "step"
            with self._clock(part, slots):
                # Other graphs write where this one leaves its results, a prompt's for one, and a tree is given away.
                outcome = self._recorder.replay(bucket).clone()
        else:
            part = "choose"
            outcome = self._loop.step(bucket, lambda part: self._clock(part, slots), corrected)
        self._stopwatch.stop()
        return _Round(slots, outcome, part, self._recorder.captures == recorded)

    def _end_round(self, round_: _Round) -> list[_Taken]:
        """Read what a round brought, and do all that the next one depends on."""
        along, ends = round_.outcome.along, self.target.eos_token_ids
        with self._clock(round_.part, round_.slots):
            table = round_.outcome.table.tolist()
        taken, accepted = [], {}
        for row, (slot, (count, *chosen)) in enumerate(zip(round_.slots, table, strict=False)):  # behind: padding
            if slot.finish_reason is None:  # it may have been cancelled meanwhile
                nodes, accepted[slot] = chosen.pop(), chosen[:count]
                tokens = slot.take(accepted[slot], ends)
                drafted = min(len(tokens), count - 1)
                slot.stats.add_pass(len(tokens), drafted, nodes - 1)
                known = () if along is None else likelihoods(along[row], slot.sampling, tokens)
                taken.append(_Taken(slot, slice(row, row + 1), tokens, drafted, known))
        by_row = [accepted.get(slot, []) for slot in self._running]  # which may have moved
        self._target.settle([len(chosen) for chosen in by_row])
        self._drafter.settle(by_row)
        kept = {slot: len(chosen) - 1 for slot, chosen in accepted.items()}
        self._plan.learn(kept, self._stopwatch.seconds if round_.ordinary else None)
        return taken

    def _bucket(self, slots: Sequence[Slot]) -> Bucket:
        """What the next step looks like. The tree's shape is decided here and nowhere else."""
        rows, longest = len(slots), self._target.cache.longest
        bucket = Bucket(rows, Needs.of([slot.sampling for slot in slots]), self._plan.choose(slots, longest))
        bucket = replace(bucket, catch_up=self._put_off >= (1 if bucket.drafts else self._patience))
        if not self._recorder.on:
            return bucket
        return replace(bucket, rows=row_bucket(rows, self.slots), horizon=self._columns(longest))

    def _columns(self, longest: int) -> int:
        """The bound that steps of such a length share. A plan with many shapes has few, for a graph is made of each."""
        adaptive = len(self._plan.shapes) > 1
        return column_bucket(longest, self.capacity, *((1024, 1) if adaptive else ()))

    def _buckets(self, samplings: Sequence[Sampling]) -> list[Bucket]:
        """All that steps of such settings can look like; the largest first: later graphs find room in what it took."""
        alone = dict.fromkeys(Needs.of([one]) for one in samplings)
        mixed = dict.fromkeys((*alone, Needs.of(samplings)))
        rows = dict.fromkeys(row_bucket(count, self.slots) for count in range(1, self.slots + 1))
        columns = dict.fromkeys(self._columns(length) for length in range(1, self.capacity + 1))
        catch_up = (False, True) if NO_DRAFT in self._plan.shapes else (False,)
        return [
            Bucket(count, *key)
            for count in reversed(rows)
            for key in product(
                mixed if count > 1 else alone, reversed(self._plan.open(count)), reversed(columns), catch_up
            )
        ]

    def _planned(self, shape: TreeShape | Plan | Literal["auto"] | None) -> Plan:
        if shape is None or isinstance(shape, TreeShape):
            return Pinned(shape)
        if shape != "auto":
            return shape
        own = self.drafter.describe().get("tree", {})
        if "num_steps" not in own:
            return Pinned()
        largest = TreeShape(**own)  # often made for a CPU
        if self.target.device.type == "cuda":
            largest = TreeShape(*map(max, astuple(largest), astuple(ROOMY)))
        shapes = ladder(largest)
        return Planner(shapes, Costs(shapes, Store(self._facts())))

    def _facts(self) -> dict[str, Any]:
        """All that the cost of a step depends on, its shape, slots and columns apart."""
        target, on_gpu = self.target, self.target.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(target.device) if on_gpu else platform.machine(),
            "threads": torch.get_num_threads(),
            "recorded": self._recorded,
            "target": [target.family, target.num_layers, target.hidden_size, target.vocab_size],
            "dtype": target.dtype,
            "drafter": self.drafter.describe(),
            "torch": torch.__version__,
        }

    def _first(self, slot: Slot, logits: Tensor, row: int, root: Tensor) -> tuple[Tensor, Tensor]:
        """The token (1,) after the prompt, whose last is `root` (1,), and the corrected logits it is chosen from."""
        tree = DraftTree.root(root)
        if corrected := self._correction([slot]):
            logits = corrected(logits, tree)
        laws, needs = self._loop.front.laws.rows(slice(row, row + 1)), Needs.of([slot.sampling])
        return choose(logits, tree, laws, needs, torch.zeros_like(root))[0], logits

    def _correction(self, slots: Sequence[Slot]) -> Corrected | None:
        """What the slots' own past does to their logits, if their settings ask for it."""
        samplings = [slot.sampling for slot in slots]
        if not any(sampling.needs_history for sampling in samplings):
            return None
        history = [[*slot.prompt.ids.tolist(), *slot.tokens][:-1] for slot in slots]
        return lambda logits, tree: correct(logits, tree, samplings, history)

    def _leave(self) -> None:
        """Free the rows of finished slots; the last running slot moves into each gap."""
        for row in reversed(range(len(self._running))):
            if self._running[row].finish_reason is not None:
                self._plan.forget(self._running[row])
                self._target.free(row)
                self._drafter.free(row)
                self._loop.free(row, len(self._running) - 1)
                last = self._running.pop()
                if row < len(self._running):
                    self._running[row] = last
        if not self._running:
            self._under_way = None  # nobody is left to read it for

    def _check_idle(self) -> None:
        if busy := len(self._running) + len(self.pending):
            raise RuntimeError(f"{busy} slots are running: let them end, or use admit and step for all")

    def _check_room(self, prompt: Prompt, sampling: Sampling) -> None:
        asked = len(prompt) + sampling.max_new_tokens
        if len(prompt) >= self.target.context:
            raise UserError(
                f"The prompt has {len(prompt)} tokens, pictures included, and the model's context is "
                f"{self.target.context}: shorten it or use smaller pictures."
            )
        if asked > self.capacity:
            more = " or raise the capacity (--max-model-len)" if self.capacity < self.target.context else ""
            raise UserError(
                f"{len(prompt)} prompt tokens and {sampling.max_new_tokens} new ones do not fit in the {self.capacity} "
                f"rows of a slot: lower max_new_tokens{more}."
            )

    @contextmanager
    def _clock(self, part: str, slots: Sequence[Slot]) -> Iterator[None]:
        """Charge a part's time to the slots that shared it, in equal shares."""
        start = time.perf_counter()
        yield
        if self._synchronize:
            self._synchronize()
        share = (time.perf_counter() - start) / len(slots)
        for slot in slots:
            slot.stats.add_seconds(part, share)


def slot_rows(asked: int | None, context: int) -> int:
    """Rows of a slot for a model of such a context; by default no more than 4,096. Raises UserError beyond it."""
    if asked is None:
        return min(context, 4096)
    if not 0 < asked <= context:
        raise UserError(f"A slot of {asked} rows is impossible: it takes 1 to {context}, which is the model's context.")
    return asked
