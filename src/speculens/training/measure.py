"""What training is for: the acceptance length of the drafter in real decoding, and whether the text stayed the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from speculens.conversation import Conversation
from speculens.data.sources import Source
from speculens.drafters import Drafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.stats import Stats
from speculens.targets.base import Prompt, Target
from speculens.tree import TreeShape


class Exam:
    """A fixed set of prompts. The target's own greedy answers are decoded once, at the first measurement."""

    def __init__(self, target: Target, prompts: Sequence[Prompt], tokens: int) -> None:
        self._target, self._prompts = target, prompts
        self._sampling = Sampling(max_new_tokens=tokens)
        self._capacity = max(map(len, prompts)) + tokens
        self._expected: list[list[int]] | None = None

    def measure(self, drafter: nn.Module, shape: TreeShape | Literal["auto"] | None = None) -> dict[str, Any]:
        """Decode all prompts side by side with a copy of the drafter in the target's dtype; by default its own tree."""
        if self._expected is None:
            self._expected = self._decode(None)[0]
        made = copy.deepcopy(drafter).to(self._target.device, self._target.dtype).eval()
        tokens, stats = self._decode(made, shape)  # type: ignore[arg-type]
        same = sum(one == other for one, other in zip(tokens, self._expected, strict=True))
        figures = ("mean_acceptance_length", "mean_accepted_tokens", "acceptance_rate_per_position")
        notes = {name: dict(Counter(values)) for name, values in stats.drafter_notes.items()}
        measured = {"exact": same / len(tokens)} | {name: getattr(stats, name) for name in figures}
        return measured | ({"drafter_notes": notes} if notes else {})

    def _decode(
        self, drafter: Drafter | None, shape: TreeShape | Literal["auto"] | None = None
    ) -> tuple[list[list[int]], Stats]:
        # Some dozens of steps at ever fewer slots: recording them would take longer than running them.
        capture: Literal["auto", "off"] = (
            "auto" if shape == "auto" else "off"
        )  # a tree sized by its cost is another one
        slots, capacity = len(self._prompts), self._capacity
        engine = Engine(self._target, drafter, slots=slots, capacity=capacity, shape=shape, capture=capture)
        done = engine.generate_all(self._prompts, self._sampling)
        return [generation.tokens for generation in done], Stats.total(generation.stats for generation in done)


def exam(target: Target, source: Source, prompts: int, tokens: int) -> Exam | None:
    """The first usable conversations of a source, up to their last answer; None if there are none."""
    chosen: list[Prompt] = []
    for index in range(len(source)):
        if len(chosen) == prompts:
            break
        try:
            prompt = target.encode(_question(source[index]))
        except UserError:
            continue
        if len(prompt) + tokens <= target.context:
            chosen.append(prompt)
    return Exam(target, chosen, tokens) if chosen else None


def _question(conversation: Conversation) -> Conversation:
    """What the last answer answers."""
    messages = conversation.messages
    while messages and messages[-1].role != "user":
        messages = messages[:-1]
    return Conversation(messages)
