"""The draft tree against plain Python: walking, ancestors, lines and masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculens.errors import UserError
from speculens.tree import DraftTree, TreeShape, tree_mask
from trees import assert_walks, draft_trees, line, trees_and_wants


@given(trees_and_wants())
def test_follow_is_the_walk_down_the_wanted_children(tree_and_want):
    assert_walks(*tree_and_want)


@given(draft_trees())
def test_ancestors_are_the_line_to_the_root(tree):
    for slot in range(len(tree.tokens)):
        for node in range(tree.size):
            assert tree.ancestors[slot, node].nonzero().flatten().tolist() == sorted(line(tree, slot, node))


@given(draft_trees())
def test_lines_list_the_nodes_from_the_root_down(tree):
    lines = tree.lines()
    assert lines.shape == (*tree.tokens.shape, tree.levels + 1)
    for slot in range(len(tree.tokens)):
        for node in tree.live[slot].nonzero().flatten().tolist():
            expected = line(tree, slot, node)
            assert lines[slot, node].tolist() == expected + [-1] * (tree.levels + 1 - len(expected))


@given(draft_trees())
def test_an_outline_leaves_padding_out_and_finds_every_line(tree):
    nodes = tree.live[0].nonzero().flatten().tolist()
    for node in nodes:
        way = line(tree, 0, node)
        tokens, parents, path = tree.outline(tree.tokens[0, way[1:]].tolist())
        assert tokens == tree.tokens[0, nodes].tolist()
        assert [nodes[above] for above in parents] == tree.parents[0, nodes].tolist()
        assert [nodes[place] for place in path] == way


@given(
    draft_trees(),
    st.lists(st.integers(0, 12), min_size=3, max_size=3),
    st.integers(0, 3),
    st.none() | st.integers(1, 9),
)
def test_mask_shows_prefix_and_own_line_within_the_window(tree, lengths, spare, window):
    lengths = lengths[: len(tree.tokens)]
    columns = max(lengths) + tree.size + spare
    mask = tree_mask(torch.tensor(lengths), tree.ancestors, columns, tree.depth, window)
    for slot, length in enumerate(lengths):
        for node in range(tree.size):
            own = set(line(tree, slot, node))
            for column in range(columns):
                position = (
                    column if column < length else length + int(tree.depth[slot, min(column - length, tree.size - 1)])
                )
                seen = column < length or column - length in own
                if window is not None:
                    seen &= length + int(tree.depth[slot, node]) - position < window
                assert bool(mask[slot, node, column]) == seen, (slot, node, column)


def test_mask_of_new_nodes_may_cover_more_columns_than_nodes():
    """Tree growth asks for the last k of M scratch columns."""
    newest = torch.tensor([[[True, False, True, False], [False, True, False, True]]])
    mask = tree_mask(torch.tensor([2]), newest, 7)
    assert mask.int().tolist() == [[[1, 1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 0, 1, 0]]]


def test_window_without_depth_is_refused():
    with pytest.raises(ValueError, match="depth"):
        tree_mask(torch.tensor([1]), torch.ones(1, 1, 1, dtype=torch.bool), 2, window=4)


def test_root_alone_accepts_itself_and_nothing_else():
    tree = DraftTree.root(torch.tensor([7, 8]))
    path, counts = tree.follow(torch.tensor([[7], [7]]))
    assert (path.tolist(), counts.tolist(), tree.size) == ([[0], [0]], [1, 1], 1)


@pytest.mark.parametrize(
    ("shape", "nodes", "levels"),
    [
        (TreeShape(5, 10, 60), 60, 6),
        (TreeShape(0, 3, 60), 4, 1),  # only three candidates
        (TreeShape(1, 2, 60), 7, 2),
        (TreeShape(5, 10, 1), 1, 0),  # no drafting at all
        (TreeShape(9, 1, 4), 4, 3),  # a chain, cut
    ],
)
def test_shape_knows_its_nodes_and_levels(shape, nodes, levels):
    assert (shape.nodes, shape.levels) == (nodes, levels)


@pytest.mark.parametrize("bad", [{"num_steps": -1}, {"topk": 0}, {"num_draft_tokens": 0}])
def test_impossible_shapes_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(UserError, match=name):
        TreeShape(**bad)
