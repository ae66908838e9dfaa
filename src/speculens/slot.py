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
    _unsaid: list[int] = field(default_factory=list)  # tokens that are not text yet
    _said: str = ""  # text that was not told yet

    @property
    def text(self) -> str:
        """What has been released so far (empty without a tokenizer)."""
        return self.stream.text if self.stream else ""

    @property
    def generation(self) -> Generation:
        """What there is of it, once it has finished."""
        return Generation(self.tokens, self.text, self.finish_reason or "", self.stats)

    def take(self, tokens: Sequence[int], ends: AbstractSet[int]) -> list[int]:
        """Take tokens one by one until it must stop; those that it took. Their text is for `say`.

        ends  ids that end a sequence
        """
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            self.tokens.append(token)
            if self.stream:
                self._unsaid.append(token)
            stopped = token in ends and not self.sampling.ignore_eos
            if self.sampling.stop:  # then the text decides, too
                stopped |= self._spell()
            if stopped or len(self.tokens) == self.sampling.max_new_tokens:
                self.finish_reason = "stop" if stopped else "length"
                break
        return taken

    def say(self) -> str:
        """The text that was released by the tokens taken since the last call."""
        self._spell()
        if self.stream and self.finish_reason in ("stop", "length"):
            self._said += self.stream.finish()
        text, self._said = self._said, ""
        return text

    def _spell(self) -> bool:
        """Turn tokens into text; whether that completes a stop string."""
        complete = False
        while self.stream and self._unsaid:
            released, complete = self.stream.push(self._unsaid.pop(0))
            self._said += released
        return complete


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
