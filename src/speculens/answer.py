"""An answer as its reader meets it: text in runs of one origin, with wall time; and answers side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from speculens.engine import Engine
from speculens.sampling import Sampling
from speculens.slot import Generation, Step
from speculens.stats import Stats
from speculens.targets import Prompt
from speculens.text import TextStream


@dataclass(frozen=True)
class Run:
    """Text of one origin: `drafted` tokens were guessed and kept, the others are the target's own."""

    text: str
    drafted: bool


@dataclass(frozen=True)
class Answer:
    """A finished generation with its runs and its wall time, in seconds (prefill included, loading not)."""

    generation: Generation
    runs: tuple[Run, ...]
    seconds: float
    time_to_first_token: float

    @property
    def decode_seconds(self) -> float:
        """Without the time to the first token (vision tower and prefill)."""
        return self.seconds - self.time_to_first_token

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all the time, prefill included."""
        return len(self.generation.tokens) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        done = self.generation
        return {
            "tokens": done.tokens,
            "text": done.text,
            "finish_reason": done.finish_reason,
            "seconds": self.seconds,
            "time_to_first_token": self.time_to_first_token,
            "tokens_per_second": self.tokens_per_second,
            "stats": done.stats.to_dict(),
        }


def ask(engine: Engine, prompt: Prompt, sampling: Sampling, on_run: Callable[[Run], None] | None = None) -> Answer:
    """Decode one prompt to its end; `on_run` sees each run as it comes. Without it nothing but decoding is timed."""
    words = TextStream(engine.target.tokenizer)
    seen: list[Run] = []
    times: list[float] = []
    steps: list[Step] = []
    begun = time.perf_counter()
    for step in engine.stream(prompt, sampling):
        times.append(time.perf_counter() - begun)
        steps.append(step)
        if on_run:
            for run in runs(words, step):
                seen.append(run)
                on_run(run)
    if not on_run:
        seen = [run for step in steps for run in runs(words, step)]
    return Answer(steps[-1].slot.generation, tuple(seen), times[-1], times[0])


def warm_up(engines: Iterable[Engine], prompt: Prompt, sampling: Sampling) -> None:
    """A few tokens each: the first passes of a process are slower than all later ones."""
    for engine in engines:
        ask(engine, prompt, replace(sampling, max_new_tokens=min(8, sampling.max_new_tokens)))


def runs(words: TextStream, step: Step) -> list[Run]:
    """At most two: what was drafted and kept, then the target's own. `words` has seen the steps before this one."""
    pieces = [words.push(token)[0] for token in step.tokens]
    own = step.accepted < len(step.tokens)
    border = sum(map(len, pieces[: step.accepted])) if own else len(step.text)
    parts = (step.text[:border], True), (step.text[border:], False)
    return [Run(text, drafted) for text, drafted in parts if text]


@dataclass(frozen=True)
class Entry:
    """One drafter's line in a comparison: its answers to some prompts, pooled, beside the target's own answers."""

    drafter: str
    answers: Sequence[Answer]
    own: Sequence[Answer]

    @property
    def stats(self) -> Stats:
        """The passes of all answers."""
        return Stats.total(answer.generation.stats for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens of all answers, each prefill's token included."""
        return sum(len(answer.generation.tokens) for answer in self.answers)

    @property
    def seconds(self) -> float:
        """Wall time of all answers."""
        return sum(answer.seconds for answer in self.answers)

    @property
    def walltime_speedup(self) -> float:
        """Autoregressive time over this drafter's time, end to end."""
        return sum(answer.seconds for answer in self.own) / self.seconds

    @property
    def decode_speedup(self) -> float:
        """The same without the time to the first token; 0 if there was nothing to decode."""
        spent = sum(answer.decode_seconds for answer in self.answers)
        return sum(answer.decode_seconds for answer in self.own) / spent if spent else 0.0

    @property
    def num_exact(self) -> int:
        """How many answers equal the target's own, token for token."""
        return sum(difference is None for difference in self.differences)

    @property
    def differences(self) -> list[int | None]:
        """Of each answer the first token, from 0, that is not the target's own; None where all are."""
        pairs = zip(self.answers, self.own, strict=True)
        return [_first_difference(mine.generation.tokens, own.generation.tokens) for mine, own in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `exact` is the share of prompts, as in docs/benchmarks.md."""
        return {
            "drafter": self.drafter,
            "prompts": len(self.answers),
            "num_output_tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "walltime_speedup": self.walltime_speedup,
            "decode_speedup": self.decode_speedup,
            "exact": self.num_exact / len(self.answers),
            "first_differences": self.differences,
            "stats": self.stats.to_dict(),
        }


def _first_difference(mine: Sequence[int], own: Sequence[int]) -> int | None:
    if mine == own:
        return None
    shorter = min(len(mine), len(own))
    return next((at for at in range(shorter) if mine[at] != own[at]), shorter)
