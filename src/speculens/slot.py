"""One sequence on its way through the engine, and what a step and all of them together brought it."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from speculens.sampling import Logprob, Sampling
from speculens.stats import Stats
from speculens.targets.base import Prompt
from speculens.text import TextStream
from speculens.tree import DraftTree


@dataclass(eq=False)
class Slot:
    """One running sequence. `tokens` are those emitted so far, the prefill's first.

    finish_reason  None while running; then `stop` (an EOS token or stop string), `length`, `cancelled` or `error`
    error          what ended a submitted request before its first token
    """

    prompt: Prompt
    sampling: Sampling
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stats: Stats = field(default_factory=Stats)
    error: Exception | None = None

    @property
    def text(self) -> str:
        """What has been released so far (empty without a tokenizer)."""
        return self.stream.text if self.stream else ""

    @property
    def generation(self) -> Generation:
        """What there is of it, once it has finished."""
        return Generation(self.tokens, self.text, self.finish_reason or "", self.stats)

    def emit(self, tokens: Sequence[int], ends: AbstractSet[int]) -> tuple[list[int], str]:
        """Take tokens one by one until it must stop; those that it took, and the newly released text.

        ends  ids that end a sequence
        """
        emitted: list[int] = []
        text = ""
        for token in tokens:
            emitted.append(token)
            self.tokens.append(token)
            stopped = token in ends and not self.sampling.ignore_eos
            if self.stream:
                released, complete = self.stream.push(token)
                text += released
                stopped = stopped or complete
            if stopped or len(self.tokens) == self.sampling.max_new_tokens:
                self.finish_reason = "stop" if stopped else "length"
                text += self.stream.finish() if self.stream else ""
                break
        return emitted, text


@dataclass(frozen=True)
class Step:
    """What one round brought one slot.

    tokens    emitted, cut at the first stop
    text      newly released text
    accepted  how many of the tokens were drafted (the others are the target's bonus, or the prefill's)
    tree      the draft tree of this slot, (1, N); None at the prefill
    logprobs  of each emitted token, if the slot's sampling asks for them
    """

    slot: Slot
    tokens: list[int]
    text: str
    accepted: int
    tree: DraftTree | None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A finished sequence."""

    tokens: list[int]
    text: str
    finish_reason: str
    stats: Stats
