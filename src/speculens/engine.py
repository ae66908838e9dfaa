"""The loop: draft, score, choose, follow, keep. Slots are admitted and freed between steps.

Every emitted token is the target's own choice given its prefix. The drafter only decides how many come at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from speculens.conversation import Conversation
from speculens.drafters.base import Drafter, NoDrafter
from speculens.errors import UserError
from speculens.sampling import Sampling, choose
from speculens.stats import Stats
from speculens.targets.base import Prompt, Target
from speculens.text import TextStream
from speculens.tree import DraftTree, TreeShape


@dataclass(eq=False)
class Slot:
    """One running sequence. `tokens` are those emitted so far, the prefill's first.

    finish_reason  None while running; then `stop` (an EOS token or stop string), `length` or `cancelled`
    """

    prompt: Prompt
    sampling: Sampling
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats = field(default_factory=Stats)

    @property
    def text(self) -> str:
        """What has been released so far (empty without a tokenizer)."""
        return self.stream.text if self.stream else ""

    @property
    def length(self) -> int:
        """Rows committed in the target's cache: prompt and output, without the newest token."""
        return len(self.prompt) + len(self.tokens) - 1


@dataclass(frozen=True)
class Step:
    """What one round brought one slot.

    tokens    emitted, cut at the first stop
    text      newly released text
    accepted  how many of the tokens were drafted (the others are the target's bonus, or the prefill's)
    tree      the draft tree of this slot, (1, N); None at the prefill
    """

    slot: Slot
    tokens: list[int]
    text: str
    accepted: int
    tree: DraftTree | None


@dataclass(frozen=True)
class Generation:
    """A finished sequence."""

    tokens: list[int]
    text: str
    finish_reason: str
    stats: Stats


class Engine:
    """Runs one target with one drafter.

    slots     sequences that run side by side
    capacity  rows of KV cache per slot: prompt and output; None takes the model's context, at most 4,096
    shape     draft tree; None takes the drafter's own
    timed     wait for the device around each part, so that `Stats.seconds` is true on a GPU (costs speed there)
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        slots: int = 1,
        capacity: int | None = None,
        shape: TreeShape | None = None,
        timed: bool = False,
    ) -> None:
        self.target, self.drafter = target, drafter or NoDrafter()
        self.slots = slots
        self.capacity = capacity or min(target.context, 4096)
        self._drafter = self.drafter.session(target, slots, self.capacity, shape)
        # Drafted nodes are scored above the committed rows.
        self._target = target.session(slots, self.capacity + self._drafter.nodes)
        self._running: list[Slot] = []
        self._synchronize = torch.cuda.synchronize if timed and target.device.type == "cuda" else None

    @property
    def running(self) -> Sequence[Slot]:
        """Slots in row order."""
        return tuple(self._running)

    # One request

    def generate(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Generation:
        """Decode one request to its end."""
        return self.generate_all([request], [sampling or Sampling()])[0]

    def stream(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Iterator[Step]:
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
        return [Generation(s.tokens, s.text, s.finish_reason or "", s.stats) for s in done]

    # Slots

    def admit(self, request: Conversation | Prompt, sampling: Sampling | None = None) -> Step:
        """Prefill a request into a free slot and choose its first token.

        Raises UserError if it cannot fit, RuntimeError if no slot is free.
        """
        if len(self._running) == self.slots:
            raise RuntimeError(f"all {self.slots} slots are running")
        sampling = sampling or Sampling()
        prompt = request if isinstance(request, Prompt) else self.target.encode(request)
        self._check_room(prompt, sampling)
        tokenizer = self.target.tokenizer
        slot = Slot(prompt, sampling, TextStream(tokenizer, sampling.stop) if tokenizer else None)
        with self._clock("prefill", [slot]):
            logits, features = self._target.prefill(prompt)
            try:
                tree = DraftTree.root(features.tokens[:, -1])
                past = prompt.ids[:-1].tolist() if sampling.needs_history else []
                first = choose(logits, tree, [sampling], torch.zeros_like(tree.tokens[0]), [past])[0]
                slot.stats.add_prompt(len(prompt), int(prompt.image.sum()))
                if begun := self._drafter.begin(features, first):
                    slot.stats.add_view(begun.rows, begun.notes)
            except BaseException:
                self._target.free(len(self._running))
                raise
        self._running.append(slot)
        emitted, text = self._emit(slot, first.tolist())
        step = Step(slot, emitted, text, 0, None)
        self._leave()
        return step

    def step(self) -> list[Step]:
        """One round for every running slot."""
        slots = list(self._running)
        if not slots:
            return []
        device = self.target.device
        roots = torch.tensor([slot.tokens[-1] for slot in slots], device=device)
        with self._clock("draft", slots):
            tree = self._drafter.draft(roots)
        with self._clock("score", slots):
            logits, hidden = self._target.score(tree)
        with self._clock("choose", slots):
            want = self._choose(logits, tree, slots)
            path, counts = tree.follow(want)
            tokens = want.gather(1, path)
            self._target.keep(path, counts)
            table = torch.cat([counts[:, None], tokens], 1).tolist()  # the step's one host read
        steps = []
        for row, (slot, (count, *chosen)) in enumerate(zip(slots, table, strict=True)):
            emitted, text = self._emit(slot, chosen[:count])
            accepted = min(len(emitted), count - 1)
            slot.stats.add_pass(len(emitted), accepted, int(tree.size) - 1)
            steps.append(Step(slot, emitted, text, accepted, tree.rows(slice(row, row + 1))))
        if any(slot.finish_reason is None for slot in slots):
            with self._clock("observe", slots):
                along = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
                self._drafter.observe(along, tokens, [count for count, *_ in table])
        self._target.settle([slot.length for slot in slots])
        self._leave()
        return steps

    def cancel(self, slot: Slot) -> None:
        """End a slot now; its row is free for the next request. Does nothing if it has ended already."""
        if slot.finish_reason is None:
            slot.finish_reason = "cancelled"
            self._leave()

    # Inside

    def _choose(self, logits: Tensor, tree: DraftTree, slots: Sequence[Slot]) -> Tensor:
        position = torch.tensor([len(slot.tokens) for slot in slots], device=logits.device)
        samplings = [slot.sampling for slot in slots]
        needed = any(sampling.needs_history for sampling in samplings)
        history = [slot.prompt.ids.tolist() + slot.tokens[:-1] if needed else [] for slot in slots]
        return choose(logits, tree, samplings, position, history)

    def _emit(self, slot: Slot, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Hand tokens to a slot one by one until it must stop."""
        emitted: list[int] = []
        text = ""
        for token in tokens:
            emitted.append(token)
            slot.tokens.append(token)
            stopped = token in self.target.eos_token_ids and not slot.sampling.ignore_eos
            if slot.stream:
                released, complete = slot.stream.push(token)
                text += released
                stopped = stopped or complete
            if stopped or len(slot.tokens) == slot.sampling.max_new_tokens:
                slot.finish_reason = "stop" if stopped else "length"
                break
        return emitted, text

    def _leave(self) -> None:
        """Free the rows of finished slots; the last running slot moves into each gap."""
        for row in reversed(range(len(self._running))):
            if self._running[row].finish_reason is not None:
                self._target.free(row)
                self._drafter.free(row)
                last = self._running.pop()
                if row < len(self._running):
                    self._running[row] = last

    def _check_idle(self) -> None:
        if self._running:
            raise RuntimeError(f"{len(self._running)} slots are running: let them end, or use admit and step for all")

    def _check_room(self, prompt: Prompt, sampling: Sampling) -> None:
        asked = len(prompt) + sampling.max_new_tokens
        if len(prompt) >= self.target.context:
            raise UserError(
                f"The prompt has {len(prompt)} tokens, pictures included, and the model's context is "
                f"{self.target.context}: shorten it or use smaller pictures."
            )
        if asked > self.capacity:
            raise UserError(
                f"{len(prompt)} prompt tokens and {sampling.max_new_tokens} new ones do not fit in the {self.capacity} "
                "rows of a slot: lower max_new_tokens or raise the capacity (--max-model-len)."
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
