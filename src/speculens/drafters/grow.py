"""EAGLE-2's dynamic draft tree (arXiv 2406.16858, section 4): expand the likeliest beam, keep the likeliest nodes.

All of it is tensor operations over slots, without a loop over nodes and without a host read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speculens.tree import DraftTree, TreeShape

# propose(hidden (B, n, H), k) -> of the k likeliest tokens after each, log-probabilities (B, n, k) in float32, falling,
# and tokens (B, n, k)
Propose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# expand(tokens (B, k), hidden of their parents (B, k, H), level, lineage (B, k, (level + 1) k)) -> hidden (B, k, H);
# lineage marks, among the nodes expanded so far, each node's ancestors and itself
Expand = Callable[[Tensor, Tensor, int, Tensor], Tensor]


def grow(roots: Tensor, hidden: Tensor, propose: Propose, expand: Expand, shape: TreeShape) -> DraftTree:
    """Grow a tree under each root.

    roots   (B,) the newest token of each slot
    hidden  (B, H) the drafter's output that predicts what follows the root
    """
    batch, width = len(roots), shape.topk
    order = torch.arange(1 + shape.candidates, device=roots.device)  # every node in the order in which it is created
    scores, tokens = (top[:, 0] for top in propose(hidden[:, None], width))
    all_tokens, all_scores = [roots[:, None], tokens], [torch.zeros_like(scores[:, :1]), scores]

    nodes = order[1 : width + 1].expand(batch, -1)
    expanded = [order[:1].expand(batch, -1)]  # whose children the later nodes are, `width` of each but the root's
    own = torch.eye(width, dtype=torch.bool, device=roots.device).expand(batch, -1, -1)
    lineage, parent_hidden = own, hidden[:, None].expand(-1, width, -1)
    for level in range(shape.num_steps):
        output = expand(tokens, parent_hidden, level, lineage)
        gains, drafted = propose(output, width)
        reach, children = (scores[..., None] + gains).flatten(1), drafted.flatten(1)
        all_tokens.append(children)
        all_scores.append(reach)
        expanded.append(nodes)
        if level + 1 == shape.num_steps:
            break
        scores, best = reach.topk(width)
        tokens, nodes, parent = children.gather(1, best), best + (1 + width + level * width**2), best // width
        parent_hidden = output.gather(1, parent[..., None].expand_as(output))
        lineage = torch.cat([lineage.gather(1, parent[..., None].expand_as(lineage)), own], 2)
    # The first level counts as the root's; the root itself comes before it, with itself as its parent.
    parents = torch.cat([expanded[0], torch.cat(expanded, 1).repeat_interleave(width, 1)], 1)
    depth = ((order - 1 - width).div(width**2, rounding_mode="floor") + 2).minimum(order).expand(batch, -1)
    return _best(torch.cat(all_tokens, 1), torch.cat(all_scores, 1), parents, depth, shape)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of (..., V) logits: their log-probabilities in float32, falling, and their tokens."""
    tokens = logits.topk(count).indices
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens), tokens


def _best(tokens: Tensor, scores: Tensor, parents: Tensor, depth: Tensor, shape: TreeShape) -> DraftTree:
    """Keep the root and the most probable of all nodes created, (B, 1 + candidates), parents before children.

    A child never scores above its parent, and the stable sort keeps creation order among equals, so the kept set is
    closed under ancestors even on ties. A drafter that overflows gives NaN, which would sort above the root.
    """
    scores = scores.masked_fill(~(scores <= 0), -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.nodes]
    kept = order.sort(dim=1).values
    place = torch.zeros_like(tokens).scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    live = torch.ones_like(kept, dtype=torch.bool)
    return DraftTree.build(
        tokens.gather(1, kept), place.gather(1, parents.gather(1, kept)), depth.gather(1, kept), live, shape.levels
    )
