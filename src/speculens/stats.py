"""Steps -> figures. One definition each (docs/benchmarks.md, measures); JSON keys are the attribute names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class Stats:
    """What decoding one or more sequences came to.

    num_prompt_tokens    rows of the target's prefill, pictures included
    num_visual_tokens    rows of pictures among them
    num_drafter_rows     rows of the drafter's prefill
    num_drafts           target passes that scored a tree (the prefill is not one)
    num_tokens           tokens emitted by those passes; the prefill's token is not counted
    num_draft_tokens     drafted nodes that were scored
    num_accepted_tokens  drafted tokens that the target kept
    accepted_at          accepted_at[i]: passes that kept at least i + 1 drafted tokens
    seconds              of the host by part: prefill, draft, score, choose, observe; or step, where all four were one
                         graph: launching it and waiting for it, not what the host does meanwhile
    drafter_notes        what the drafter decided about each picture, lists by name; most drafters decide nothing
    """

    num_prompt_tokens: int = 0
    num_visual_tokens: int = 0
    num_drafter_rows: int = 0
    num_drafts: int = 0
    num_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    drafter_notes: dict[str, list[str]] = field(default_factory=dict)

    def add_prompt(self, tokens: int, visual: int) -> None:
        """Count the target's prefill: its rows, and those of pictures among them."""
        self.num_prompt_tokens += tokens
        self.num_visual_tokens += visual

    def add_view(self, rows: int, notes: Mapping[str, Sequence[str]]) -> None:
        """Count the drafter's prefill: its rows, and what it decided."""
        self.num_drafter_rows += rows
        for name, values in notes.items():
            self.drafter_notes.setdefault(name, []).extend(values)

    def add_pass(self, emitted: int, accepted: int, drafted: int) -> None:
        """Count one target pass of one slot: tokens emitted after cutting, drafted tokens kept, drafted nodes."""
        self.num_drafts += 1
        self.num_tokens += emitted
        self.num_draft_tokens += drafted
        self.num_accepted_tokens += accepted
        self.accepted_at.extend([0] * (accepted - len(self.accepted_at)))
        for level in range(accepted):
            self.accepted_at[level] += 1

    def add_seconds(self, part: str, seconds: float) -> None:
        """Charge time to a part of the loop."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @staticmethod
    def total(parts: Iterable[Stats]) -> Stats:
        """Pool the passes of several runs."""
        pooled = Stats()
        for part in parts:
            pooled.add_prompt(part.num_prompt_tokens, part.num_visual_tokens)
            pooled.add_view(part.num_drafter_rows, part.drafter_notes)
            pooled.num_drafts += part.num_drafts
            pooled.num_tokens += part.num_tokens
            pooled.num_draft_tokens += part.num_draft_tokens
            pooled.num_accepted_tokens += part.num_accepted_tokens
            pooled.accepted_at.extend([0] * (len(part.accepted_at) - len(pooled.accepted_at)))
            for level, count in enumerate(part.accepted_at):
                pooled.accepted_at[level] += count
            for name, seconds in part.seconds.items():
                pooled.add_seconds(name, seconds)
        return pooled

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, bonus token included (as vLLM, SGLang, EAGLE and SpecVLM count)."""
        return self.num_tokens / self.num_drafts if self.num_drafts else 0.0

    @property
    def mean_accepted_tokens(self) -> float:
        """Drafted tokens kept per target pass, bonus excluded (as ViSpec, HiViS and MMSpec count)."""
        return self.num_accepted_tokens / self.num_drafts if self.num_drafts else 0.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Share of passes whose i-th drafted level was accepted, unconditional."""
        return [count / self.num_drafts for count in self.accepted_at]

    @property
    def acceptance_histogram(self) -> list[int]:
        """Passes that kept exactly 0, 1, 2, ... drafted tokens."""
        at_least = [self.num_drafts, *self.accepted_at, 0]
        return [more - less for more, less in pairwise(at_least)]

    @property
    def drafter_prefill_ratio(self) -> float:
        """Rows of the drafter's prefill over rows of the target's."""
        return self.num_drafter_rows / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def draft_time_fraction(self) -> float | None:
        """Share of decoding time that the drafter takes (prefill apart); None where steps were graphs: it is not seen.

        `Engine(timed=True)` sees it, of steps that run one kernel at a time.
        """
        if "step" in self.seconds:
            return None
        decode = sum(seconds for part, seconds in self.seconds.items() if part != "prefill")
        return (self.seconds.get("draft", 0.0) + self.seconds.get("observe", 0.0)) / decode if decode else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, under the names of measures."""
        return {
            "mean_acceptance_length": self.mean_acceptance_length,
            "mean_accepted_tokens": self.mean_accepted_tokens,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
            "acceptance_histogram": self.acceptance_histogram,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_visual_tokens": self.num_visual_tokens,
            "num_drafter_rows": self.num_drafter_rows,
            "drafter_prefill_ratio": self.drafter_prefill_ratio,
            "num_drafts": self.num_drafts,
            "num_tokens": self.num_tokens,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "draft_time_fraction": self.draft_time_fraction,
            "seconds": dict(self.seconds),
            "drafter_notes": dict(self.drafter_notes),
        }
