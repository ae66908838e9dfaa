"""The draft tree: guessed tokens and their parents, batched over slots, and the walk that verifies them.

A slot whose text so far ends in "Mars is a" may be guessed like this (tokens left, node numbers right):

    a                       0          parents    [0, 0, 0, 1, 2]
    ├── red   ── dark       1, 3       depth      [0, 1, 1, 2, 2]
    └── dusty ── world      2, 4       ancestors of node 4: {0, 2, 4}

Node 0, the root, is a token that the target has already chosen. The target scores all nodes in one pass and
says at each node which token it wants next; `DraftTree.follow` walks down while a child equals that want.
Because every emitted token is the target's own want given its own prefix, the walk *is* the verification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculens.errors import UserError
from speculens.ops import kernels_for

MOST_FOLLOWED = 1024  # nodes, of which the kernel holds some rows of the ancestors at once


@dataclass(frozen=True)
class TreeShape:
    """How large a dynamic draft tree grows (EAGLE-2, arXiv 2406.16858, section 4).

    num_steps         beam expansions after the first level (`depth` in EAGLE): the tree is `num_steps + 1` levels deep
    topk              children tried per node, and width of the beam
    num_draft_tokens  nodes that the target scores in one pass, the root included (as EAGLE and SGLang count)
    """

    num_steps: int = 5
    topk: int = 10
    num_draft_tokens: int = 60

    def __post_init__(self) -> None:
        for name in ("num_steps", "topk", "num_draft_tokens"):
            least = 0 if name == "num_steps" else 1
            if getattr(self, name) < least:
                raise UserError(f"The draft tree's {name} must be at least {least}, not {getattr(self, name)}.")

    @property
    def levels(self) -> int:
        """Depth of the deepest node that such a tree can hold."""
        return min(self.num_steps + 1, self.num_draft_tokens - 1)

    @property
    def candidates(self) -> int:
        """How many nodes growth creates before the best are kept."""
        return self.topk + self.num_steps * self.topk**2

    @property
    def nodes(self) -> int:
        """Size of the tree, the root included: small beams may not offer `num_draft_tokens - 1` candidates."""
        return min(self.num_draft_tokens, self.candidates + 1)

    @property
    def scratch(self) -> int:
        """Columns that a drafter needs above what is committed: for an accepted path, and for all that is drafted."""
        return self.levels + 1 + self.num_steps * self.topk


@dataclass(frozen=True)
class DraftTree:
    """Draft tokens of B slots as trees of N nodes; node 0 is the root and parents come before their children.

    tokens     (B, N) long
    parents    (B, N) long; the root's parent is itself
    depth      (B, N) long, 0 at the root
    live       (B, N) bool; False marks padding that can never be accepted
    ancestors  (B, N, N) bool; row i marks node i and everything above it
    levels     a bound on `depth`, known to the host: the width of an accepted path is at most `levels + 1`

    Siblings carry different tokens, so that at most one child can equal the target's want.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    live: Tensor
    ancestors: Tensor
    levels: int

    @staticmethod
    def build(tokens: Tensor, parents: Tensor, depth: Tensor, live: Tensor, levels: int) -> DraftTree:
        """Complete a tree from (B, N) tokens, parents, depth and live."""
        return DraftTree(tokens, parents, depth, live, _ancestors(parents, levels), levels)

    @staticmethod
    def root(tokens: Tensor) -> DraftTree:
        """The tree of one node, tokens (B,): no draft at all, plain autoregressive decoding."""
        tokens = tokens[:, None]
        zeros = torch.zeros_like(tokens)
        live = torch.ones_like(tokens, dtype=torch.bool)
        return DraftTree(tokens, zeros, zeros, live, live[:, None], 0)

    @staticmethod
    def chain(tokens: Tensor) -> DraftTree:
        """One line of tokens (B, N), the first of them the root."""
        nodes = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        live = torch.ones_like(tokens, dtype=torch.bool)
        return DraftTree.build(tokens, (nodes - 1).clamp(min=0), nodes, live, tokens.shape[1] - 1)

    @property
    def size(self) -> int:
        """Nodes per slot, the root and padding included."""
        return self.tokens.shape[1]

    def rows(self, which: Tensor | slice) -> DraftTree:
        """The trees of some of the slots."""
        return self._each(lambda part: part[which])

    def clone(self) -> DraftTree:
        """The same in memory of its own: a replayed step writes its next tree into this one's."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> DraftTree:
        parts = (self.tokens, self.parents, self.depth, self.live, self.ancestors)
        tokens, parents, depth, live, ancestors = map(change, parts)
        return DraftTree(tokens, parents, depth, live, ancestors, self.levels)

    def follow(self, want: Tensor) -> tuple[Tensor, Tensor]:
        """Walk each slot's tree from the root along the target's wants.

        want  (B, N): the target's own next token at each node.
        Returns path (B, P) with P = min(levels + 1, N), node indices from the root down, and counts (B,), how many of
        them were accepted (the root always is). Entries beyond a slot's count are any nodes.
        No host read. A node is accepted iff each node on its line equals its parent's want.
        """
        if self.size <= MOST_FOLLOWED and (kernels := kernels_for(self.tokens, "speculens.kernels_tree")):
            parts = self.tokens, self.parents, self.depth, self.live, self.ancestors
            return kernels.follow(*parts, want, min(self.levels + 1, self.size))
        agrees = (self.tokens == want.gather(1, self.parents)) & self.live
        agrees[:, 0].fill_(True)
        accepted = ~(self.ancestors & ~agrees[:, None, :]).any(-1)
        order = self.depth.masked_fill(~accepted, self.levels + 1)
        path = order.argsort(dim=1, stable=True)[:, : self.levels + 1]
        return path, accepted.sum(1)

    def outline(self, kept: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The first slot's tree on the host, without padding: tokens, parents, and the nodes from the root down `kept`.

        kept  the drafted tokens that were emitted
        """
        tokens, parents, live = (part[0].tolist() for part in (self.tokens, self.parents, self.live))
        nodes = [0, *(node for node in range(1, len(tokens)) if live[node])]
        place = {node: index for index, node in enumerate(nodes)}
        children = {(parents[node], tokens[node]): node for node in nodes[1:]}
        path = [0]
        for token in kept:
            path.append(children[path[-1], token])
        return (
            [tokens[node] for node in nodes],
            [place[parents[node]] for node in nodes],
            [place[node] for node in path],
        )

    def lines(self) -> Tensor:
        """(B, N, levels + 1): the nodes from the root down to each node, -1 beyond its depth."""
        batch, size = self.tokens.shape
        nodes = torch.arange(size, device=self.tokens.device).expand(batch, size, size)
        spare = self.levels + 1  # an extra column that swallows every non-ancestor
        column = torch.where(self.ancestors, self.depth[:, None, :], spare)
        lines = torch.full((batch, size, spare + 1), -1, device=self.tokens.device)
        return lines.scatter_(2, column, nodes)[..., :-1]


def take_last(held: Tensor, along: Tensor, counts: Tensor) -> None:
    """Replace held (B, ...) by the last that counts of along (B, P, ...), in place; where counts (B,) is 0 it stays."""
    held = held[:, None]
    index = counts.view(-1, *[1] * (held.ndim - 1)).expand_as(held)
    torch.gather(torch.cat([held, along], 1), 1, index, out=held)


def _ancestors(parents: Tensor, levels: int) -> Tensor:
    """(B, N, N) bool reachability from (B, N) parents, by squaring: log2(levels) small products."""
    size = parents.shape[1]
    nodes = torch.arange(size, device=parents.device)
    reach = ((parents[..., None] == nodes) | (nodes[:, None] == nodes)).float()
    steps = 1
    while steps < levels:
        reach = (reach @ reach).clamp_(max=1)
        steps *= 2
    return reach > 0


def tree_mask(
    lengths: Tensor, ancestors: Tensor, columns: int, depth: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Which KV columns each tree node may see: (B, N, columns) bool.

    lengths    (B,) committed rows of each slot; column c < length is the prefix, column length + j is node j
    ancestors  (B, N, M) bool with M >= N: which of the M newest columns node i may see
    window     sliding-window size in positions (needs depth (B, N), with M == N); None sees the whole prefix
    """
    place = torch.arange(columns, device=lengths.device)
    batch, nodes, newest = ancestors.shape
    mask = (place < lengths[:, None])[:, None].repeat(1, nodes, 1)
    # A row that does not run may be longer than what is looked at; what it sees does not matter.
    index = (lengths[:, None] + place[:newest]).clamp(max=columns - 1)
    mask.scatter_(2, index[:, None].expand_as(ancestors), ancestors)
    if window is None:
        return mask
    if depth is None:
        raise ValueError("a sliding window needs the depth of the nodes")
    position = place.expand(batch, -1).scatter(1, index, lengths[:, None] + depth)
    near = (lengths[:, None] + depth)[..., None] - position[:, None] < window
    return mask & near
