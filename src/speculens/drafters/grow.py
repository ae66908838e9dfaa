"""EAGLE-2's dynamic draft tree (arXiv 2406.16858, section 4): expand the likeliest beam, keep the likeliest nodes.

All of it is tensor operations over slots, without a loop over nodes and without a host read: `likeliest` proposes,
`extend` makes a level, `best` ends. On a GPU each of them is a launch or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speculens.ops import kernels_for
from speculens.tree import DraftTree, TreeShape

# propose(hidden (B, n, H), k) -> of the k likeliest tokens after each, log-probabilities (B, n, k) in float32, falling,
# and tokens (B, n, k)
Propose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# expand(tokens (B, k), hidden of their parents (B, k, H), level, lineage (B, k, (level + 1) k)) -> hidden (B, k, H);
# lineage marks, among the nodes expanded so far, each node's ancestors and itself
Expand = Callable[[Tensor, Tensor, int, Tensor], Tensor]

KERNELS = "speculens.kernels_tree"
MOST_CHILDREN, MOST_CREATED = 32, 1024  # of a node, and of a tree: what the kernels hold at once


class Created(NamedTuple):
    """Room for every node in the order in which it is created, the root first: (B, 1 + candidates) each.

    tokens, parents, depth  long; the root's parent is itself
    scores                  float32, log-probability of a node's line; the root's is 0
    """

    tokens: Tensor
    scores: Tensor
    parents: Tensor
    depth: Tensor

    @staticmethod
    def under(roots: Tensor, candidates: int) -> Created:
        """Only the roots (B,) so far."""
        tokens, parents, depth = roots.new_zeros(3, len(roots), 1 + candidates)
        tokens[:, 0] = roots
        return Created(tokens, torch.zeros_like(tokens, dtype=torch.float32), parents, depth)


@dataclass(frozen=True)
class Beam:
    """The m nodes of a level that grow on.

    scores   (B, m) float32, falling
    tokens   (B, m) long
    nodes    (B, m) long, their numbers among all created
    lineage  (B, m, M) bool: which of the M nodes expanded so far, these included, are their ancestors or themselves
    hidden   (B, m, H) the drafter's output at their parents
    """

    scores: Tensor
    tokens: Tensor
    nodes: Tensor
    lineage: Tensor
    hidden: Tensor


def grow(roots: Tensor, hidden: Tensor, propose: Propose, expand: Expand, shape: TreeShape) -> DraftTree:
    """Grow a tree under each root.

    roots   (B,) the newest token of each slot
    hidden  (B, H) the drafter's output that predicts what follows the root
    """
    created, output = Created.under(roots, shape.candidates), hidden[:, None]
    root = slice(0, 1)
    none = torch.zeros(len(roots), 1, 0, dtype=torch.bool, device=roots.device)  # the root is nobody's new column
    beam = Beam(created.scores[:, root], created.tokens[:, root], created.parents[:, root], none, output)
    first = 1
    for level in range(shape.num_steps + 1):
        gains, drafted = propose(output, shape.topk)
        beam = extend(created, beam, output, gains, drafted, first, level + 1)
        first += gains[0].numel()
        if level < shape.num_steps:
            output = expand(beam.tokens, beam.hidden, level, beam.lineage)
    return best(created, shape)


def likeliest(logits: Tensor, count: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `count` largest of (..., V) logits: their log-probabilities in float32, falling, and their tokens.

    ids  (V,) the tokens that the columns stand for; None: their own numbers
    """
    if count <= MOST_CHILDREN and (kernels := kernels_for(logits, KERNELS)):
        return kernels.likeliest(logits, count, ids)
    tokens = logits.topk(count).indices
    scores = logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens)
    return scores, tokens if ids is None else ids[tokens]


def extend(
    created: Created, beam: Beam, hidden: Tensor, gains: Tensor, drafted: Tensor, first: int, depth: int
) -> Beam:
    """Enter the children of a beam into `created`, from number `first` on; the likeliest of them are the next beam.

    hidden          (B, m, H) the drafter's output at the beam's nodes
    gains, drafted  (B, m, k) log-probabilities and tokens of their children
    depth           of the children
    """
    batch, _, count = gains.shape
    if count <= MOST_CHILDREN and (kernels := kernels_for(gains, KERNELS)):
        return Beam(
            *kernels.extend(created, beam.scores, beam.nodes, beam.lineage, hidden, gains, drafted, first, depth)
        )
    reach, children = (beam.scores[..., None] + gains).flatten(1), drafted.flatten(1)
    parents = beam.nodes.repeat_interleave(count, 1)
    new = slice(first, first + reach.shape[1])
    created.tokens[:, new], created.scores[:, new] = children, reach
    created.parents[:, new] = parents
    created.depth[:, new].fill_(depth)  # assigning a number would send it from the host
    # Stable, so that creation order decides among equals, here as at the end.
    scores, order = (part[:, :count] for part in reach.sort(dim=1, descending=True, stable=True))
    parent = (order // count)[..., None]
    own = torch.eye(count, dtype=torch.bool, device=gains.device).expand(batch, -1, -1)
    lineage = beam.lineage.gather(1, parent.expand(-1, -1, beam.lineage.shape[2]))
    return Beam(
        scores,
        children.gather(1, order),
        order + first,
        torch.cat([lineage, own], 2),
        hidden.gather(1, parent.expand(-1, -1, hidden.shape[2])),
    )


def best(created: Created, shape: TreeShape) -> DraftTree:
    """Keep the root and the most probable of all nodes created, parents before children.

    A child never scores above its parent, and the stable sort keeps creation order among equals, so the kept set is
    closed under ancestors even on ties. A drafter that overflows gives NaN, which would sort above the root.
    """
    tokens, scores, parents, depth = created
    if tokens.shape[1] <= MOST_CREATED and (kernels := kernels_for(scores, KERNELS)):
        tokens, parents, depth, live, ancestors = kernels.best(*created, shape.nodes, shape.levels)
        return DraftTree(tokens, parents, depth, live, ancestors, shape.levels)
    scores = scores.masked_fill(~(scores <= 0), -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.nodes]
    kept = order.sort(dim=1).values
    place = torch.zeros_like(tokens).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    live = torch.ones_like(kept, dtype=torch.bool)
    return DraftTree.build(
        tokens.gather(1, kept), place.gather(1, parents.gather(1, kept)), depth.gather(1, kept), live, shape.levels
    )
