"""Draft trees of any form, and what they mean in plain Python."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import NotExactError
from speculens.tree import DraftTree

VOCAB = 5  # few tokens: wants and drafts often agree


@st.composite
def _tries(draw, size):
    """One slot's nodes: tokens, parents, depth, live; siblings differ, dead nodes may be anything."""
    tokens, parents, depth, live = [draw(st.integers(0, VOCAB - 1))], [0], [0], [True]
    taken = set()
    while len(tokens) < size:
        parent = draw(st.integers(0, len(tokens) - 1))
        token = draw(st.integers(0, VOCAB - 1))
        alive = live[parent] and (parent, token) not in taken
        taken.add((parent, token))
        tokens.append(token)
        parents.append(parent if alive else 0)
        depth.append(depth[parent] + 1 if alive else draw(st.integers(0, 1)))
        live.append(alive)
    return tokens, parents, depth, live


@st.composite
def draft_trees(draw, most_slots=3, most_nodes=9):
    batch, size = draw(st.integers(1, most_slots)), draw(st.integers(1, most_nodes))
    slots = [draw(_tries(size)) for _ in range(batch)]
    tokens, parents, depth, live = (torch.tensor(part) for part in zip(*slots, strict=True))
    levels = int(depth.max()) + draw(st.integers(0, 2))  # a bound, not always reached
    return DraftTree.build(tokens, parents, depth, live.bool(), levels)


@st.composite
def trees_and_wants(draw):
    tree = draw(draft_trees())
    size = tree.tokens.numel()
    wants = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
    return tree, torch.tensor(wants).view_as(tree.tokens)


def line(tree: DraftTree, slot: int, node: int) -> list[int]:
    """The nodes from the root down to `node`."""
    nodes = [node]
    while nodes[-1] != 0:
        nodes.append(int(tree.parents[slot, nodes[-1]]))
    return nodes[::-1]


def walk(tree: DraftTree, slot: int, want: Tensor) -> list[int]:
    """Verification as one would say it: go to the live child that the target wants, while there is one."""
    path = [0]
    while True:
        children = [
            node
            for node in range(1, tree.size)
            if tree.parents[slot, node] == path[-1]
            and tree.live[slot, node]
            and tree.tokens[slot, node] == want[slot, path[-1]]
        ]
        if not children:
            return path
        path.append(children[0])


def assert_walks(tree: DraftTree, want: Tensor) -> None:
    """`follow` is `walk`."""
    path, counts = tree.follow(want)
    assert path.shape[1] == min(tree.levels + 1, tree.size)
    for slot in range(len(tree.tokens)):
        if path[slot, : counts[slot]].tolist() != walk(tree, slot, want):
            raise NotExactError(f"slot {slot} of {tree} under {want}")
