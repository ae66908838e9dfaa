"""EAGLE-2's dynamic draft tree (arXiv 2406.16858, section 4): expand the likeliest beam, keep the likeliest nodes.

All of it is tensor operations over slots, without a loop over nodes and without a host read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speculens.tree import DraftTree, TreeShape

# propose(hidden (B, n, H), k) -> of the k likeliest tokens after each, log-probabilities (B, n, k) in float32, falling,
# and tokens (B, n, k)
Propose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# expand(tokens (B, k), hidden of their parents (B, k, H), level, lineage (B, k, (level + 1) k)) -> hidden (B, k, H);
# lineage marks, among the nodes expanded so far, each node's ancestors and itself
Expand = Callable[[Tensor, Tensor, int, Tensor], Tensor]


@dataclass
class _Candidates:
    """Every node created so far, in creation order: parents before children. Node 0 is the root."""

    tokens: list[Tensor]
    scores: list[Tensor]
    parents: list[Tensor]
    depth: list[Tensor]

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor, depth: int) -> None:
        self.tokens.append(tokens)
        self.scores.append(scores)
        self.parents.append(parents)
        self.depth.append(torch.full_like(tokens, depth))


def grow(roots: Tensor, hidden: Tensor, propose: Propose, expand: Expand, shape: TreeShape) -> DraftTree:
    """Grow a tree under each root.

    roots   (B,) the newest token of each slot
    hidden  (B, H) the drafter's output that predicts what follows the root
    """
    batch, width = len(roots), shape.topk
    zeros = torch.zeros_like(roots)[:, None]
    found = _Candidates([roots[:, None]], [hidden.new_zeros(batch, 1, dtype=torch.float32)], [zeros], [zeros])

    scores, tokens = (top[:, 0] for top in propose(hidden[:, None], width))
    nodes = torch.arange(1, width + 1, device=roots.device).expand(batch, -1)
    found.add(tokens, scores, zeros.expand(-1, width), 1)

    own = torch.eye(width, dtype=torch.bool, device=roots.device).expand(batch, -1, -1)
    lineage, parent_hidden = own, hidden[:, None].expand(-1, width, -1)
    for level in range(shape.num_steps):
        output = expand(tokens, parent_hidden, level, lineage)
        gains, drafted = propose(output, width)
        reach, children = (scores[..., None] + gains).flatten(1), drafted.flatten(1)
        created = 1 + width + level * width**2
        found.add(children, reach, nodes.repeat_interleave(width, 1), level + 2)
        if level + 1 == shape.num_steps:
            break
        scores, best = reach.topk(width)
        tokens, nodes, parent = children.gather(1, best), created + best, best // width
        parent_hidden = output.gather(1, parent[..., None].expand_as(output))
        lineage = torch.cat([lineage.gather(1, parent[..., None].expand_as(lineage)), own], 2)
    return _best(found, shape)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (..., V) logits: their log-probabilities in float32, falling, and their tokens."""
    top = logits.topk(count)
    # Not above 0, rounding included: the sum holds exp(0), so its logarithm is not negative.
    return top.values.float() - logits.float().logsumexp(-1, keepdim=True), top.indices


def _best(found: _Candidates, shape: TreeShape) -> DraftTree:
    """Keep the root and the most probable candidates.

    A child never scores above its parent, and the stable sort keeps creation order among equals, so the kept set is
    closed under ancestors even on ties. A drafter that overflows gives NaN, which would sort above the root.
    """
    tokens, scores, parents, depth = (
        torch.cat(part, 1) for part in (found.tokens, found.scores, found.parents, found.depth)
    )
    scores = torch.where(scores <= 0, scores, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.nodes]
    kept = order.sort(dim=1).values
    place = torch.zeros_like(tokens).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    live = torch.ones_like(kept, dtype=torch.bool)
    return DraftTree.build(
        tokens.gather(1, kept), place.gather(1, parents.gather(1, kept)), depth.gather(1, kept), live, shape.levels
    )
