"""Triton kernels of drafting against their definitions in torch: on a GPU, or where Triton is in its interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tritons import DEVICE  # isort: skip - first, for it may skip this module

from speculens import kernels_tree
from speculens import tree as tree_file
from speculens.drafters import grow as grow_file
from speculens.drafters.grow import Created, best, grow, likeliest
from speculens.tree import DraftTree, TreeShape
from trees import trees_and_wants

pytestmark = [
    # Triton's interpreter turns arrays of one element into numbers, which newer NumPy dislikes.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    # It computes by NumPy, which tells of numbers that are none.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]
VOCAB = 23
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """What is compared with must not be the kernels themselves."""
    use(monkeypatch, None)
    torch.manual_seed(0)


def use(monkeypatch, kernels):
    for file in (grow_file, tree_file):
        monkeypatch.setattr(file, "kernels_for", lambda *_: kernels)


def parts(tree: DraftTree) -> dict[str, list]:
    assert tree.live.all()
    return {name: getattr(tree, name).tolist() for name in ("tokens", "parents", "depth", "ancestors")}


def test_all_of_them_can_be_tried_out():
    kernels_tree.try_out(torch.device(DEVICE))


# The likeliest tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "count", "block"),
    [
        ((1, 1, 100), 3, 32),  # several blocks, the last one part full
        ((3, 1, 20), 10, 16),
        ((2, 1, 7), 7, 2048),  # all of a vocabulary smaller than a block
        ((1, 1, 18), 5, 4),  # more is asked than a block has
        ((1, 1, 9), 1, 8),
    ],
)
def test_likeliest(dtype, shape, count, block):
    logits = (torch.randperm(torch.Size(shape).numel()).view(shape) / 8 - 3).to(DEVICE, dtype)  # no two are equal
    got, want = kernels_tree.likeliest(logits, count, None, block=block), likeliest(logits, count)
    torch.testing.assert_close(got, want)
    ids = torch.randperm(1000, device=DEVICE)[: shape[-1]]
    assert kernels_tree.likeliest(logits, count, ids, block=block)[1].equal(ids[want[1]])


def test_rows_of_logits_need_not_be_neighbours():
    logits = torch.randn(2, 2, 40, device=DEVICE)[..., :20]
    torch.testing.assert_close(kernels_tree.likeliest(logits, 4, None, block=16), likeliest(logits, 4))


def test_among_equals_the_lowest_token_is_the_likeliest():
    logits = torch.zeros(1, 1, 20, device=DEVICE)
    logits[..., 13] = 1
    scores, tokens = kernels_tree.likeliest(logits, 4, None, block=8)
    assert tokens.tolist() == [[[13, 0, 1, 2]]]
    torch.testing.assert_close(scores, logits.log_softmax(-1).gather(-1, tokens))


@pytest.mark.parametrize(
    "values", [[NAN], [-NAN], [-INF], [INF], [0.0, -INF], [NAN, 1.0], [INF, -INF, NAN, 2.0]], ids=str
)
def test_whatever_the_logits_are_siblings_are_different_tokens_of_the_vocabulary(values):
    logits = torch.tensor(values, device=DEVICE).repeat(VOCAB)[:VOCAB].view(1, 1, VOCAB)
    _, tokens = kernels_tree.likeliest(logits, 6, None, block=8)
    chosen = tokens.flatten().tolist()
    assert len(set(chosen)) == 6 and min(chosen) >= 0 and max(chosen) < VOCAB


def test_what_cannot_be_comes_last():
    logits = torch.full((1, 1, 20), -INF, device=DEVICE)
    logits[0, 0, [17, 3]] = torch.tensor([1.0, 2.0], device=DEVICE)
    scores, tokens = kernels_tree.likeliest(logits, 4, None, block=8)
    assert tokens.tolist() == [[[3, 17, 0, 1]]]
    torch.testing.assert_close(scores, logits.log_softmax(-1).gather(-1, tokens))


# Growth


class Drafter:
    """Gains depend on all that `expand` is given; `coarse` makes many of them equal. Computes on the CPU."""

    def __init__(self, size: int, coarse: bool) -> None:
        self.head, self.embed = torch.randn(size, VOCAB), torch.randn(VOCAB, size)
        self.coarse = coarse

    def propose(self, hidden, count):
        scores, tokens = (hidden.cpu() @ self.head).log_softmax(-1).topk(count)
        return (scores.floor() if self.coarse else scores).to(DEVICE), tokens.to(DEVICE)

    def expand(self, tokens, parents, level, lineage):
        seen = (lineage.cpu() * torch.arange(1, 1 + lineage.shape[2])).sum(2, keepdim=True)
        return (self.embed[tokens.cpu()] + parents.cpu() / 2 + seen + level).sin().to(DEVICE)


@pytest.mark.parametrize("coarse", [False, True], ids=["all different", "many equal"])
@pytest.mark.parametrize(
    ("shape", "batch", "size"),
    [
        (TreeShape(2, 3, 12), 3, 5),
        (TreeShape(0, 4, 60), 2, 5),  # one level, all of it kept
        (TreeShape(3, 1, 3), 1, 5),  # a chain, cut
        (TreeShape(2, 2, 1), 1, 5),  # no drafting at all
        (TreeShape(1, 5, 20), 1, 1100),  # hidden rows wider than one program takes along
        (TreeShape(4, 16, 70), 1, 3),  # lineages wider than a block, more candidates than two tiles
    ],
)
def test_growth(monkeypatch, shape, batch, size, coarse):
    drafter = Drafter(size, coarse)
    given = torch.arange(batch, device=DEVICE), torch.randn(batch, size).to(DEVICE), drafter.propose, drafter.expand
    want = grow(*given, shape)
    taken = []
    own = kernels_tree.extend
    monkeypatch.setattr(kernels_tree, "extend", lambda *given: taken.append(given) or own(*given))
    use(monkeypatch, kernels_tree)
    got = grow(*given, shape)
    assert len(taken) == shape.num_steps + 1
    assert parts(got) == parts(want)


@pytest.mark.parametrize("odd", [[NAN], [NAN, -1.0], [-INF, 0.0], [INF, -INF, NAN, -1.0]], ids=str)
def test_growth_of_a_drafter_that_overflows(monkeypatch, odd):
    shape = TreeShape(2, 4, 9)

    def propose(hidden, count):
        rows = hidden.shape[0] * hidden.shape[1]
        gains = torch.tensor(odd, device=DEVICE).repeat(rows * count)[: rows * count]
        return gains.view(*hidden.shape[:2], count), torch.arange(count, device=DEVICE).expand(*hidden.shape[:2], -1)

    def expand(tokens, _parents, _level, _lineage):
        return torch.zeros(*tokens.shape, 2, device=DEVICE)

    use(monkeypatch, kernels_tree)
    tree = grow(torch.tensor([VOCAB], device=DEVICE), torch.zeros(1, 2, device=DEVICE), propose, expand, shape)
    assert int(tree.tokens[0, 0]) == VOCAB, "the root stays what the target chose"
    edges = list(zip(tree.parents[0, 1:].tolist(), tree.tokens[0, 1:].tolist(), strict=True))
    assert len(set(edges)) == shape.nodes - 1, "siblings differ"
    use(monkeypatch, None)
    built = DraftTree.build(tree.tokens, tree.parents, tree.depth, tree.live, tree.levels)
    assert parts(built) == parts(tree)
    assert tree.depth[0, 1:].equal(tree.depth[0].gather(0, tree.parents[0, 1:]) + 1)
    assert (tree.parents[0, 1:] < torch.arange(1, tree.size, device=DEVICE)).all()


@pytest.mark.parametrize(("batch", "total", "nodes"), [(2, 40, 9), (1, 33, 33), (1, 90, 50)])
def test_the_best_of_what_was_created(batch, total, nodes):
    parents = torch.tensor([[max(0, (i - 1) // 3) for i in range(total)]] * batch)
    steps = torch.randint(-2, 1, (batch, total)).float()  # many are equal
    steps[:, 0] = 0
    depth, scores = torch.zeros_like(parents), torch.zeros(batch, total)
    for i in range(1, total):
        depth[:, i] = depth[:, parents[0, i]] + 1
        scores[:, i] = scores[:, parents[0, i]] + steps[:, i]
    created = Created(*(part.to(DEVICE) for part in (torch.randint(VOCAB, (batch, total)), scores, parents, depth)))
    shape = TreeShape(6, total, nodes)
    got = DraftTree(*kernels_tree.best(*created, nodes, shape.levels), shape.levels)
    assert parts(got) == parts(best(created, shape))


# Following


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees_and_wants())
def test_follow(tree_and_want):
    tree, want = tree_and_want
    length = min(tree.levels + 1, tree.size)
    given = (tree.tokens, tree.parents, tree.depth, tree.live, tree.ancestors, want)
    path, counts = (part.cpu() for part in kernels_tree.follow(*(part.to(DEVICE) for part in given), length))
    wanted_path, wanted_counts = tree.follow(want)
    assert path.shape == wanted_path.shape and counts.equal(wanted_counts)
    assert int(path.min()) >= 0 and int(path.max()) < tree.size
    for mine, theirs, count in zip(path, wanted_path, counts, strict=True):
        assert mine[:count].equal(theirs[:count])


def test_follow_in_a_tree_of_more_rows_than_a_block():
    tree = DraftTree.chain(torch.arange(80, device=DEVICE)[None])
    want = torch.arange(1, 81, device=DEVICE)[None].clone()
    want[0, 70] = 0
    given = (tree.tokens, tree.parents, tree.depth, tree.live, tree.ancestors, want)
    path, counts = kernels_tree.follow(*given, 80)
    assert counts.tolist() == [71] and path[0, :71].tolist() == list(range(71))
