"""Which tree the next step drafts: pinned, or the one that makes the most tokens a second here and now.

    expected(shape)  1 + c (s_1 + s_1 s_2 + ...), tokens of one slot; s_i: level i is accepted, given it is reached
    choice           the shape of the largest  expected(shape) / cost(shape, slots, columns)

Costs are measured on this machine (`costs.py`). The s_i are tracked online for each slot, and a step that several share
goes by their mean; c is what history makes of their law for this shape. The tree of one node drafts nothing: where it
is the best choice, steps are plain decoding, and now and then a tree probes whether that is still so. A purse bounds
what all of this can lose.

Any choice is lossless. The target draws its own next token at every node of whatever tree there is, and what is emitted
are those draws; the tree only decides how many of them one pass makes known. Shapes are chosen before the step from
the lengths of earlier accepted paths and from the clock, never from the draws of the step itself, so the choice at an
output position is the same draw from the same law under every sequence of shapes; with a seed it is the same token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import Any, Protocol

from speculens.costs import Costs, Scale, scale_of, within
from speculens.tree import TreeShape

NO_DRAFT = TreeShape(num_steps=0, topk=1, num_draft_tokens=1)
# Few, so that few graphs are recorded; their nodes are powers of 2. Chains where a pass is dear by the node, wide trees
# where it costs the same for all of them.
LADDER = (
    TreeShape(0, 1, 2),
    TreeShape(2, 1, 4),
    TreeShape(3, 2, 8),
    TreeShape(4, 4, 16),
    TreeShape(5, 6, 32),
)
ROOMY = TreeShape(5, 10, 60)  # where a pass costs hardly more with many nodes

CREDIT = 4.0  # steps of plain decoding that may be lost before anything was won
SAVINGS = 16.0  # of those that were won, so many may be kept for later: a few trees in a row fail by chance alone
INCOME = 0.005  # of such a step for each token emitted: what probing may cost in the long run
PATIENCE = 16  # plain steps between probes of a tree
FADE = 0.01  # share of its history that a level or a shape forgets at each drafted step that leaves it out


class Plan(Protocol):
    """Chooses shapes. `shapes` are all that it may choose, the largest last; None stands for the drafter's own tree."""

    @property
    def shapes(self) -> Sequence[TreeShape | None]: ...

    def open(self, slots: int) -> Sequence[TreeShape | None]:
        """Those of `shapes` that so many slots may get."""

    def choose(self, slots: Sequence[Hashable], columns: int) -> TreeShape | None:
        """The shape of the next step of these slots, whose longest has so many committed columns."""

    def learn(self, accepted: Mapping[Any, int], seconds: float | None) -> None:
        """What the step came to: drafted tokens that each slot accepted; its seconds, if it was an ordinary one."""

    def forget(self, slot: Hashable) -> None:
        """A slot has ended."""


@dataclass(frozen=True)
class Pinned:
    """Always the same tree."""

    shape: TreeShape | None = None

    @property
    def shapes(self) -> Sequence[TreeShape | None]:
        return (self.shape,)

    def open(self, slots: int) -> Sequence[TreeShape | None]:
        return self.shapes

    def choose(self, slots: Sequence[Hashable], columns: int) -> TreeShape | None:
        return self.shape

    def learn(self, accepted: Mapping[Any, int], seconds: float | None) -> None: ...

    def forget(self, slot: Hashable) -> None: ...


def ladder(largest: TreeShape) -> tuple[TreeShape, ...]:
    """No draft, the rungs that fit within a drafter's own tree in every respect, and that tree."""
    fitting = [
        rung
        for rung in LADDER
        if rung.num_steps <= largest.num_steps and rung.topk <= largest.topk and rung.nodes < largest.nodes
    ]
    return (NO_DRAFT, *fitting, largest)


@dataclass
class Survival:
    """How likely each level of a tree is missed once it is reached, in terms of a chain: a single guess a level.

    A level of w nodes misses with probability m^(1 + log10 w), m being a chain's miss: ten nodes miss as often as two
    independent single guesses would. Crude, and corrected by shape (`Planner`); it lets one shape's history speak for
    the others. Estimates are means of the first looks, later exponentially weighted ones. A level that trees no longer
    have becomes as the one above, bit by bit: else a few unlucky looks would keep trees from it for ever.

    misses  of levels 1, 2, ...
    looks   at each level so far
    memory  looks that an estimate remembers
    """

    memory: int
    misses: list[float] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)

    def learn(self, shape: TreeShape, accepted: int) -> None:
        """A tree of this shape was followed so far down."""
        levels, power = _law(shape)
        for level in range(min(accepted + 1, levels)):
            if level == len(self.misses):  # never seen: it begins as the one above, with a little trust
                self.misses.append(_at(self.misses, level))
                self.looks.append(2)
            self.looks[level] = min(self.looks[level] + 1, self.memory)
            miss = self.misses[level] ** power
            miss += (float(level == accepted) - miss) / self.looks[level]
            self.misses[level] = miss ** (1 / power)
        for level in range(max(levels, 1), len(self.misses)):
            self.misses[level] += FADE * (self.misses[level - 1] - self.misses[level])

    def heir(self, memory: int) -> Survival:
        """One that starts with these estimates and trusts them as its own."""
        return Survival(memory, list(self.misses), [memory] * len(self.misses))


def expected(misses: Sequence[float], shape: TreeShape) -> float:
    """Tokens of a tree of this shape that are accepted, the bonus not counted, by a chain's misses of each level."""
    levels, power = _law(shape)
    total, reach = 0.0, 1.0
    for level in range(levels):
        reach *= 1 - _at(misses, level) ** power
        total += reach
    return total


def _at(misses: Sequence[float], level: int) -> float:
    """Where nobody has looked, the level above speaks; without any, most drafters' habits."""
    return misses[min(level, len(misses) - 1)] if misses else 0.4


@cache
def _law(shape: TreeShape) -> tuple[int, float]:
    """Levels, and the power of a chain's miss that a level of so many nodes on average has."""
    levels = shape.levels
    return levels, 1 + math.log10((shape.nodes - 1) / levels) if levels else 1.0


UNTRIED = (8.0, 8.8)  # expected, accepted: a shape that was never tried may be a little better than the law says


@dataclass
class _Record:
    """What one shape accepted, against what `Survival` expected; old steps fade."""

    expected: float = UNTRIED[0]
    accepted: float = UNTRIED[1]

    def learn(self, expected: float, accepted: float) -> None:
        self.expected = 0.97 * self.expected + expected
        self.accepted = 0.97 * self.accepted + accepted

    def rest(self) -> None:
        """Another shape was drafted: it slowly becomes as if never tried, so that bad luck is not for ever."""
        self.expected += FADE * (UNTRIED[0] - self.expected)
        self.accepted += FADE * (UNTRIED[1] - self.accepted)

    @property
    def ratio(self) -> float:
        return self.accepted / self.expected if self.expected else 1.0


class Planner:
    """The adaptive plan over a ladder of shapes, of which the first drafts nothing.

    The purse holds steps of plain decoding. Each step pays in what its tokens would have cost without drafts and pays
    out what it cost, by its own time; a shape is open to choice only if the purse could bear that nothing of it is
    accepted. So once costs are known, and whatever drafter and text do, speculation is never behind plain decoding by
    more than CREDIT steps and INCOME of the tokens, and gives back SAVINGS of what it won at most. Only while a plain
    step is told dearer than it is, it may lose more.
    """

    def __init__(self, shapes: Sequence[TreeShape], costs: Costs) -> None:
        self.shapes, self._costs = tuple(shapes), costs
        self._common = Survival(memory=100)
        self._slots: dict[Hashable, Survival] = {}
        self._records = {shape: _Record() for shape in self.shapes}
        self._purse, self._plain_steps = CREDIT, 0
        self._drafted_steps: Counter[Scale] = Counter()  # since the last plain one
        self._chosen, self._scale, self._known = NO_DRAFT, (0, 0), False
        self._misses: list[float] | None = None
        self._expected: dict[TreeShape, float] = {}

    def open(self, slots: int) -> Sequence[TreeShape]:
        """As many nodes as all slots together may have."""
        return within(self.shapes, scale_of(slots, 1))

    def choose(self, slots: Sequence[Hashable], columns: int) -> TreeShape:
        """Take turns while the scale is new; then the best that the purse can bear."""
        self._scale = scale_of(len(slots), columns)
        misses = _mean([self._survival(slot).misses for slot in slots])
        if misses != self._misses:  # which steps without a draft leave as they were
            self._misses, self._expected = misses, {shape: expected(misses, shape) for shape in self.shapes}
        untimed = self._costs.untimed(self._scale)
        self._known = untimed is None
        self._chosen = self._best() if untimed is None else untimed
        return self._chosen

    def learn(self, accepted: Mapping[Any, int], seconds: float | None) -> None:
        """Costs, survival, the records of the shapes, and the purse."""
        shape, mean = self._chosen, sum(accepted.values()) / len(accepted)
        paid = self._price(shape) if self._known else 0.0
        if seconds is not None:
            paid *= self._costs.learn(self._scale, shape, seconds)
        if shape != NO_DRAFT:
            for each, record in self._records.items():
                record.learn(self._expected[shape], mean) if each == shape else record.rest()
            for slot, count in accepted.items():
                self._survival(slot).learn(shape, count)
                self._common.learn(shape, count)
        if self._known:
            won = 1 + mean - paid if shape != NO_DRAFT else 0.0
            self._purse = min(self._purse + won + INCOME * (1 + mean), SAVINGS)
            # A probe that pays is followed by the next one at once.
            self._plain_steps = self._plain_steps + 1 if shape == NO_DRAFT else PATIENCE if won > 0 else 0
            self._drafted_steps[self._scale] = 0 if shape == NO_DRAFT else self._drafted_steps[self._scale] + 1

    def forget(self, slot: Hashable) -> None:
        """Its estimates go; what all slots have in common stays."""
        self._slots.pop(slot, None)

    def _best(self) -> TreeShape:
        costs = self._costs.of(self._scale)

        def rate(shape: TreeShape) -> float:
            return (1 + self._expected[shape] * self._records[shape].ratio) / costs[shape]

        bearable = [shape for shape in costs if shape != NO_DRAFT and self._price(shape) - 1 <= self._purse]
        if not bearable or self._plain_is_due():
            return NO_DRAFT
        best = max(bearable, key=rate)
        return best if rate(best) > rate(NO_DRAFT) or self._plain_steps >= PATIENCE else NO_DRAFT

    def _plain_is_due(self) -> bool:
        """So many drafted steps in a row: soon at first, then seldom, for all prices hang on what a plain one costs."""
        rest = PATIENCE * min(1 + self._costs.looks(self._scale, NO_DRAFT), 16)
        return self._drafted_steps[self._scale] >= rest

    def _price(self, shape: TreeShape) -> float:
        """Of a step, in steps of plain decoding."""
        costs = self._costs.of(self._scale)
        return costs[shape] / costs[NO_DRAFT]

    def _survival(self, slot: Hashable) -> Survival:
        if slot not in self._slots:
            self._slots[slot] = self._common.heir(memory=12)
        return self._slots[slot]


def _mean(misses: Sequence[Sequence[float]]) -> list[float]:
    """Of all slots, level by level; a slot that has not seen a level has no say there."""
    levels = ([miss for miss in level if miss is not None] for level in zip_longest(*misses))
    return [sum(level) / len(level) for level in levels]
