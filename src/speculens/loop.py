"""One step as one function: draft, score, choose, follow, keep, observe, and the next roots.

Everything that a step takes from the step before lives on the device, in buffers that stay where they are: the front
below, the lengths of the caches, what the drafter carries. Everything else is the step's `Bucket`, known to the host
and hashable. So a step of a bucket is always the same work on the same buffers, whether it runs now or is replayed as a
graph, and nothing is read back inside it; the one read of a step is the caller's, of `Outcome.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from speculens.drafters.base import DraftSession
from speculens.ops import gather_rows
from speculens.sampling import Laws, Needs, Sampling, choose
from speculens.targets.base import TargetSession
from speculens.tree import DraftTree, TreeShape, take_last


@dataclass(frozen=True)
class Bucket:
    """What of a step is not on the device.

    rows     how many rows take part; those behind the running ones are padding
    needs    the work that the rows' settings ask for
    shape    of the draft tree; None is the drafter's own
    horizon  a bound of every slot's committed rows; 0 looks exactly as far as each step must
    catch_up the drafter first observes what it has put off
    """

    rows: int
    needs: Needs
    shape: TreeShape | None = None
    horizon: int = 0
    catch_up: bool = False

    @property
    def drafts(self) -> bool:
        """Whether the tree has more than its root."""
        return self.shape is None or self.shape.nodes > 1


@dataclass(frozen=True)
class Outcome:
    """What a step brought.

    tree   as drafted
    table  (B, 2 + P) long: how many tokens a row accepted, 0 where it does not run, the tokens, the first so many, and
           last the nodes of its tree, padding left out
    along  (B, P, V) corrected logits that the tokens were chosen from; None unless a row asks how likely they were
    """

    tree: DraftTree
    table: Tensor
    along: Tensor | None = None

    def clone(self) -> Outcome:
        """The same in memory of its own."""
        return Outcome(self.tree.clone(), self.table.clone(), None if self.along is None else self.along.clone())


@dataclass(frozen=True)
class Front:
    """Where each row's text ends, on the device.

    roots     (slots,) long, the newest token
    position  (slots,) long, its number among the outputs plus one: the number of the token wanted at it
    live      (slots,) bool, False where no slot runs: nothing of such a row advances
    laws      how its tokens are chosen
    """

    roots: Tensor
    position: Tensor
    live: Tensor
    laws: Laws

    @staticmethod
    def empty(slots: int, device: torch.device) -> Front:
        """No row runs."""
        zeros = torch.zeros(slots, dtype=torch.long, device=device)
        return Front(zeros, zeros.clone(), zeros.bool(), Laws.of([Sampling()] * slots, device))

    def prepare(self, row: int, sampling: Sampling) -> None:
        """How the tokens of a row are chosen that is about to run."""
        self.laws.put(row, sampling)

    def admit(self, row: int, first: Tensor) -> None:
        """A prepared row begins to run: its first token (1,) is chosen already."""
        self.roots[row : row + 1] = first
        self.position[row].fill_(1)
        self.live[row].fill_(True)

    def free(self, row: int, last: int) -> None:
        """A row ends; the last running one takes its place."""
        for part in (self.roots, self.position, self.live, *self.laws.parts):
            part[row] = part[last]
        self.live[last].fill_(False)

    def advance(self, tokens: Tensor, counts: Tensor) -> None:
        """The last accepted of tokens (B, P) is the next root; where counts (B,) is 0 nothing changes."""
        rows = len(counts)
        take_last(self.roots[:rows], tokens, counts)
        self.position[:rows].add_(counts)  # `+=` on a slice would copy it onto itself


@dataclass(frozen=True)
class Backlog:
    """What the drafter has not observed yet: in steps without a draft it puts that off, and catches up in one pass.

    hidden  (slots, W, H), tokens (slots, W) and counts (slots,) as `DraftSession.observe` takes them
    """

    hidden: Tensor
    tokens: Tensor
    counts: Tensor

    @staticmethod
    def empty(slots: int, width: int, features: Tensor) -> Backlog:
        """Room for `width` tokens a slot, of features like these (H,)."""
        zeros = torch.zeros(slots, width, dtype=torch.long, device=features.device)
        return Backlog(features.new_zeros(slots, width, *features.shape), zeros, zeros[:, 0].clone())

    def add(self, hidden: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """One token (B, 1) of each row whose count is 1; a row whose count is 0 gets nothing."""
        rows = len(counts)
        place = self.counts[:rows].clamp(max=self.tokens.shape[1] - 1)[:, None]
        self.tokens[:rows].scatter_(1, place, tokens)
        self.hidden[:rows].scatter_(1, place[..., None].expand_as(hidden), hidden)
        self.counts[:rows].add_(counts)

    def free(self, row: int, last: int) -> None:
        """A row ends; the last running one takes its place."""
        for part in (self.hidden, self.tokens, self.counts):
            part[row] = part[last]
        self.counts[last].zero_()


# clock(part) measures the block that it is entered for
Clock = Callable[[str], AbstractContextManager[None]]
# corrected(logits (B, N, V), tree) -> logits, where settings look at a row's past, which is the host's
Corrected = Callable[[Tensor, DraftTree], Tensor]


@contextmanager
def silent(_part: str) -> Iterator[None]:
    """The clock that measures nothing."""
    yield


class Loop:
    """The step of one target with one drafter, which may put off observing for `patience` steps without a draft."""

    def __init__(
        self, target: TargetSession, drafter: DraftSession, slots: int, device: torch.device, patience: int = 1
    ) -> None:
        self._target, self._drafter = target, drafter
        self.front = Front.empty(slots, device)
        lender = target.target
        features = torch.zeros(lender.hidden_size, dtype=lender.dtype, device=device)
        self.backlog = Backlog.empty(slots, patience, features)

    def free(self, row: int, last: int) -> None:
        """A row ends; the last running one takes its place."""
        self.front.free(row, last)
        self.backlog.free(row, last)

    @property
    def state(self) -> tuple[Tensor, ...] | None:
        """All small tensors that a step changes for the next one; None if some of its work is the host's."""
        if self._target.state is None or self._drafter.state is None:
            return None
        backlog = (self.backlog.hidden, self.backlog.tokens, self.backlog.counts)
        return self.front.roots, self.front.position, *backlog, *self._target.state, *self._drafter.state

    @torch.no_grad()
    def step(self, bucket: Bucket, clock: Clock = silent, corrected: Corrected | None = None) -> Outcome:
        """Advance every running row among the first `bucket.rows`."""
        rows, front = slice(bucket.rows), self.front
        if bucket.catch_up:
            with clock("observe"):
                self._catch_up(rows, bucket.horizon)
        with clock("draft"):
            roots = front.roots[rows].clone()  # a tree may hold them, and this step changes them
            drafts = bucket.drafts
            tree = self._drafter.draft(roots, bucket.shape, bucket.horizon) if drafts else DraftTree.root(roots)
        with clock("score"):
            logits, hidden = self._target.score(tree, bucket.horizon)
        with clock("choose"):
            logits = corrected(logits, tree) if corrected else logits
            want = choose(logits, tree, front.laws.rows(rows), bucket.needs, front.position[rows])
            path, counts = tree.follow(want)
            counts = counts * front.live[rows]
            tokens = want.gather(1, path)
            self._target.keep(path, counts)
        with clock("observe"):
            along = gather_rows(hidden, path)
            if drafts:
                self._drafter.observe(along, tokens, counts, bucket.horizon)
            else:
                self.backlog.add(along, tokens, counts)
            front.advance(tokens, counts)
        table = torch.cat([counts[:, None], tokens, tree.live.sum(1, keepdim=True)], 1)
        return Outcome(tree, table, gather_rows(logits, path) if bucket.needs.logprobs else None)

    def _catch_up(self, rows: slice, horizon: int) -> None:
        backlog = self.backlog
        self._drafter.observe(backlog.hidden[rows], backlog.tokens[rows], backlog.counts[rows], horizon)
        backlog.counts[rows].zero_()
