"""EAGLE-2's tree against a slow one in plain Python."""

from dataclasses import dataclass

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from oracle import Ask, assert_exact, random_eagle
from speculens.attention import causal_attention
from speculens.drafters.grow import grow, likeliest
from speculens.drafters.layer import masked_attention
from speculens.sampling import Sampling
from speculens.tree import TreeShape

VOCAB = 7


@dataclass
class ToyDrafter:
    """Its next-token law depends on a node's whole line. `coarse` rounds scores, so that many are equal."""

    seed: int
    coarse: bool

    def law(self, line):
        """Log-probabilities (V,) after this line of tokens."""
        generator = torch.Generator().manual_seed(hash((self.seed, *line)) % 2**63)
        logits = torch.randn(VOCAB, generator=generator) * 2
        return -logits.abs().ceil() if self.coarse else logits.log_softmax(-1)

    def start(self, roots):
        self.lines = [(int(root),) for root in roots]  # hidden states are numbers into this list
        self.expanded = [[] for _ in roots]
        return torch.arange(len(roots), dtype=torch.float64)[:, None]

    def propose(self, hidden, count):
        rows = [self.law(self.lines[int(number)]) for number in hidden.flatten()]
        return torch.stack(rows).view(*hidden.shape[:2], VOCAB).topk(count)

    def expand(self, tokens, parents, level, lineage):
        hidden = torch.empty(*tokens.shape, 1, dtype=torch.float64)
        for slot, row in enumerate(tokens.tolist()):
            for i, token in enumerate(row):
                line = (*self.lines[int(parents[slot, i])], token)
                hidden[slot, i] = len(self.lines)
                self.lines.append(line)
                self.expanded[slot].append(line)
            for i, seen in enumerate(lineage[slot]):
                line = self.expanded[slot][level * len(row) + i]
                visible = [other for other, yes in zip(self.expanded[slot], seen.tolist(), strict=True) if yes]
                assert visible == [line[: n + 2] for n in range(level + 1)], "a node sees its own line and nothing else"
        return hidden


def slow_tree(toy, root, shape):
    """EAGLE-2, section 4, node by node: {line: score} of the nodes that are kept."""

    def children(line, score):
        top = toy.law(line).topk(shape.topk)
        return [((*line, int(t)), score + value) for t, value in zip(top.indices, top.values, strict=True)]

    beam = children((root,), torch.zeros(()))
    created = list(beam)
    for _ in range(shape.num_steps):
        level = [child for line, score in beam for child in children(line, score)]
        created += level
        level_scores = torch.stack([score for _, score in level])
        best = level_scores.sort(descending=True, stable=True).indices[: shape.topk]
        beam = [level[i] for i in best]
    ranked = sorted(created, key=lambda node: -float(node[1]))  # stable: creation order among equals
    return {line for line, _ in ranked[: shape.num_draft_tokens - 1]}


def lines_of(tree, slot):
    """The tokens from the root down to each node."""
    lines = []
    for node in range(tree.size):
        parent = int(tree.parents[slot, node])
        lines.append((*(lines[parent] if node else ()), int(tree.tokens[slot, node])))
    return lines


shapes = st.builds(TreeShape, st.integers(0, 3), st.integers(1, 4), st.integers(1, 24))


@given(shapes, st.integers(0, 10**6), st.booleans(), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3))
@example(TreeShape(3, 4, 24), 0, True, [1, 2])
def test_tree_equals_the_slow_one_also_among_equal_scores(shape, seed, coarse, roots):
    toy = ToyDrafter(seed, coarse)
    roots = torch.tensor(roots)
    tree = grow(roots, toy.start(roots), toy.propose, toy.expand, shape)
    assert tree.size == shape.nodes
    assert tree.live.all()
    for slot, root in enumerate(roots.tolist()):
        lines = lines_of(tree, slot)
        assert lines[0] == (root,)
        assert len(set(lines)) == len(lines), "siblings differ"
        assert tree.depth[slot].tolist() == [len(line) - 1 for line in lines]
        assert all(int(parent) < node for node, parent in enumerate(tree.parents[slot]) if node)
        assert max(len(line) - 1 for line in lines) <= tree.levels
        assert set(lines[1:]) == slow_tree(toy, root, shape)


def test_numbers_that_are_not_finite_cannot_push_the_root_out():
    """A drafter that overflows may draft nonsense, but node 0 must stay the token that the target chose."""
    shape = TreeShape(num_steps=2, topk=3, num_draft_tokens=6)

    def nan_law(hidden, count):
        return likeliest(torch.full((*hidden.shape[:2], VOCAB), float("nan")), count)

    tree = grow(torch.tensor([4]), torch.zeros(1, 1), nan_law, lambda *_: torch.zeros(1, 3, 1), shape)
    assert int(tree.tokens[0, 0]) == 4
    assert len(set(lines_of(tree, 0))) == shape.nodes


def test_a_drafter_that_overflows_cannot_change_the_text():
    broken = random_eagle("llava", seed=1)
    for weight in broken.parameters():
        weight.fill_(float("nan"))
    samplings = [Sampling(max_new_tokens=12)] * 2
    assert_exact("llava", broken, [Ask(), Ask(seed=1)], samplings)


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_masked_attention_with_a_triangle_is_causal_attention(seed, groups):
    """Folding the head group into the query axis changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 2 * groups, 5, 4, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    triangle = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    folded, plain = masked_attention(queries, keys, values, triangle), causal_attention(queries, keys, values)
    assert torch.allclose(folded, plain, atol=1e-12)
