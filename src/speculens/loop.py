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
from speculens.sampling import Laws, Needs, Sampling, choose
from speculens.targets.base import TargetSession
from speculens.tree import DraftTree, TreeShape


@dataclass(frozen=True)
class Bucket:
    """What of a step is not on the device.

    rows     how many rows take part; those behind the running ones are padding
    needs    the work that the rows' settings ask for
    shape    of the draft tree; None is the drafter's own
    horizon  a bound of every slot's committed rows; 0 looks exactly as far as each step must
    """

    rows: int
    needs: Needs
    shape: TreeShape | None = None
    horizon: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a step brought.

    tree   as drafted
    table  (B, 1 + P) long: how many tokens a row accepted, 0 where it does not run, and the tokens, the first so many
    """

    tree: DraftTree
    table: Tensor


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

    def admit(self, row: int, first: Tensor, sampling: Sampling) -> None:
        """A row begins to run: its first token (1,) is chosen already."""
        self.roots[row : row + 1] = first
        self.position[row] = 1
        self.live[row] = True
        self.laws.put(row, sampling)

    def free(self, row: int, last: int) -> None:
        """A row ends; the last running one takes its place."""
        for part in (self.roots, self.position, self.live, *self.laws.parts):
            part[row] = part[last]
        self.live[last] = False

    def advance(self, tokens: Tensor, counts: Tensor) -> None:
        """The last accepted of tokens (B, P) is the next root; where counts (B,) is 0 nothing changes."""
        rows = len(counts)
        newest = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self.roots[:rows] = torch.where(counts > 0, newest, self.roots[:rows])
        self.position[:rows] += counts


# clock(part) measures the block that it is entered for
Clock = Callable[[str], AbstractContextManager[None]]
# corrected(logits (B, N, V), tree) -> logits, where settings look at a row's past, which is the host's
Corrected = Callable[[Tensor, DraftTree], Tensor]


@contextmanager
def silent(_part: str) -> Iterator[None]:
    """The clock that measures nothing."""
    yield


class Loop:
    """The step of one target with one drafter."""

    def __init__(self, target: TargetSession, drafter: DraftSession, slots: int, device: torch.device) -> None:
        self._target, self._drafter = target, drafter
        self.front = Front.empty(slots, device)

    @property
    def state(self) -> tuple[Tensor, ...] | None:
        """All small tensors that a step changes for the next one; None if some of its work is the host's."""
        if self._target.state is None or self._drafter.state is None:
            return None
        return self.front.roots, self.front.position, *self._target.state, *self._drafter.state

    @torch.no_grad()
    def step(self, bucket: Bucket, clock: Clock = silent, corrected: Corrected | None = None) -> Outcome:
        """Advance every running row among the first `bucket.rows`."""
        rows, front = slice(bucket.rows), self.front
        with clock("draft"):
            tree = self._drafter.draft(front.roots[rows], bucket.shape, bucket.horizon)
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
            along = hidden.gather(1, path[..., None].expand(-1, -1, hidden.shape[-1]))
            self._drafter.observe(along, tokens, counts)
            front.advance(tokens, counts)
            return Outcome(tree, torch.cat([counts[:, None], tokens], 1))
