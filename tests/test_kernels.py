"""Triton kernels against their definitions in torch: on a GPU, or where Triton is installed in its interpreter."""

import pytest
import torch

from tritons import DEVICE  # isort: skip - first, for it may skip this module

from speculens import kernels, ops
from speculens.attention import TreeMask, tree_attention
from speculens.cache import SlotCache
from speculens.int8 import press

# Triton's interpreter turns arrays of one element into numbers, which newer NumPy dislikes.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
CLOSE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.float16: dict(rtol=1e-2, atol=1e-2)}


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch):
    """What `ops` and `attention` define is compared with, so it must not be the kernels themselves."""
    monkeypatch.setattr(ops, "kernels_for", lambda _: None)
    monkeypatch.setattr("speculens.attention.kernels_for", lambda _: None)
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "nodes", "newest", "dim", "lengths", "window", "splits"),
    [
        (4, 2, 1, 1, 64, [40], None, None),  # one token
        (4, 2, 1, 1, 64, [0], None, 4),  # of an empty slot: most splits have nothing
        (8, 2, 5, 5, 80, [60, 131], None, None),  # ragged, a dimension that is no power of two
        (4, 4, 7, 12, 128, [0, 130], None, 3),  # a drafter's level: more new columns than rows
        (7, 1, 70, 70, 64, [100], None, 2),  # more rows than a block
        (4, 2, 6, 6, 64, [150, 3], 17, 4),  # a sliding window
        (2, 2, 3, 3, 64, [127, 64], None, 1),  # blocks end where the prefix does
    ],
)
def test_tree_attention(dtype, heads, kv_heads, nodes, newest, dim, lengths, window, splits):
    batch, columns = len(lengths), max(lengths) + newest + 20
    queries = randn(batch, nodes, heads, dim, dtype=dtype).transpose(1, 2)
    keys, values = (randn(batch, columns + 9, kv_heads, dim, dtype=dtype)[:, :columns].transpose(1, 2) for _ in "kv")
    seen = torch.rand(batch, nodes, newest, device=DEVICE) < 0.4
    seen |= torch.eye(nodes, newest, dtype=torch.bool, device=DEVICE)
    mask = TreeMask(torch.tensor(lengths, device=DEVICE), seen, torch.randint(0, 4, (batch, nodes), device=DEVICE))
    want = tree_attention(queries.double(), keys.double(), values.double(), mask, 0.2, window)
    beyond = torch.arange(columns, device=DEVICE) >= mask.lengths[:, None] + newest
    for junk in (keys, values):
        junk.masked_fill_(beyond[:, None, :, None], torch.nan)  # masked by not being read: 0 times NaN is NaN
    got = kernels.attend(
        queries,
        keys,
        values,
        mask.lengths,
        seen,
        0.2,
        depth=mask.depth if window else None,
        window=window,
        splits=splits,
    )
    torch.testing.assert_close(got.double(), want, **CLOSE[dtype])


def test_a_row_that_sees_nothing_gives_zeros_and_no_nan():
    """Rows that pad a batch to a bucket."""
    states = randn(1, 2, 8, 64)
    nothing = torch.zeros(1, 1, 1, dtype=torch.bool, device=DEVICE)
    for splits in (1, 2):
        length = torch.zeros(1, dtype=torch.long, device=DEVICE)
        got = kernels.attend(states[:, :, :1], states, states, length, nothing, 1.0, splits=splits)
        assert not got.any()


@pytest.mark.parametrize("gains", [False, True], ids=["plain", "norms on heads"])
@pytest.mark.parametrize("dim", [64, 80])
def test_rotation_into_the_cache(dim, gains, monkeypatch):
    caches = []
    heads, kv_heads, nodes = 4, 2, 3
    joined, cos, sin = randn(2, nodes, (heads + 2 * kv_heads) * dim), randn(2, nodes, dim), randn(2, nodes, dim)
    norms = (randn(dim), randn(dim), 1e-6) if gains else None
    for _ in range(2):
        cache = SlotCache(
            slots=2, capacity=20, heads=kv_heads, head_dim=dim, dtype=joined.dtype, devices=[joined.device] * 2
        )
        for _row in range(2):
            cache.admit()
        cache.lengths += torch.tensor([4, 11], device=DEVICE)
        cache.settle([4, 11])
        cache.aim(range(2), nodes, start=3)
        caches.append(cache)
    want, *_ = ops.rotate_into(caches[0], 1, joined, cos, sin, norms)
    monkeypatch.setattr(ops, "kernels_for", lambda _: kernels)
    got, *_ = ops.rotate_into(caches[1], 1, joined.clone(), cos, sin, norms)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(caches[1].views(1), caches[0].views(1), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [64, 200])
@pytest.mark.parametrize("first", [False, True], ids=["with an update", "first"])
def test_residual_and_norm(size, first):
    stream, update, gain = randn(2, 3, size), None if first else randn(2, 3, size), randn(size)
    for got, want in zip(
        kernels.add_norm(stream, update, gain, 1e-5), ops.add_norm(stream, update, gain, 1e-5), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("inner", [48, 1500])
def test_swiglu(inner):
    gate_up = randn(2, 3, 2 * inner)
    torch.testing.assert_close(kernels.swiglu(gate_up), ops.swiglu(gate_up))


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 512), (37, 700)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_on_one_row(outputs, inputs, bias):
    row, weight = randn(1, 1, inputs), randn(outputs, inputs)
    added = randn(outputs) if bias else None
    torch.testing.assert_close(
        kernels.linear_row(row, weight, added), ops.linear(row, weight, added), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tile", "splits"),
    [
        (2, 40, 64, kernels.Tile(16, 32, 4, 1), 1),  # three tiles for four processors: the last is not full
        (10, 37, 100, kernels.Tile(16, 32, 4, 2), 2),  # nothing is a multiple of its block
        (17, 70, 96, kernels.Tile(16, 32, 4, 1), 3),  # four whole tiles, and the fifth in parts
        (33, 16, 500, kernels.Tile(16, 32, 4, 4), 8),
        (60, 128, 64, kernels.TILES[0], 1),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_on_a_few_rows(monkeypatch, dtype, rows, outputs, inputs, tile, splits, bias):
    monkeypatch.setattr(kernels, "_processors", lambda _: 4)
    assert kernels.shares(outputs, inputs, tile, 4)[1] == splits
    storage = randn(outputs, inputs + 32, dtype=dtype)  # a weight may be a slice of a wider one
    x, weight = randn(2, rows, inputs, dtype=dtype)[:1], storage[:, :inputs]
    added = randn(outputs, dtype=dtype) if bias else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
    once, again = (kernels.linear_rows(x, weight, added, tile=tile) for _ in range(2))
    torch.testing.assert_close(once.double(), want, **CLOSE[dtype])
    assert once.equal(again)  # the counters of arrivals are zero again


def test_parts_fill_the_device_and_cover_each_column_once():
    """The products of two 7B models on 132 processors: (whole tiles, parts of each other tile)."""
    tile = kernels.Tile(128, 64, 8, 2)
    found = {}
    for outputs, inputs in [(37888, 3584), (3584, 18944), (3584, 3584), (4608, 3584), (152064, 3584), (32768, 3584)]:
        whole, splits, share = kernels.shares(outputs, inputs, tile, 132)
        found[outputs, inputs] = whole, splits
        assert share * (splits - 1) < inputs <= share * splits and share % tile.inputs == 0
        assert (outputs // tile.outputs - whole) * splits <= 264
    assert list(found.values()) == [(264, 8), (0, 8), (0, 8), (0, 7), (1056, 2), (256, 1)]


@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_without_gradients_take_the_kernels(monkeypatch, bias):
    dtype = torch.float16
    layer = torch.nn.Linear(700, 37, bias=bias).to(DEVICE, dtype)
    monkeypatch.setattr(ops, "STREAMED_ROWS", 3)
    taken = []
    for name in ("linear_row", "linear_rows"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *x, own=own, name=name: taken.append(name) or own(*x))
    for rows in (1, 3, 4):
        x = randn(1, rows, 700, dtype=dtype)
        with torch.no_grad():
            monkeypatch.setattr(ops, "kernels_for", lambda _: None)
            want = layer(x)
            assert ops.linear(x, layer.weight, layer.bias).equal(want)
            monkeypatch.setattr(ops, "kernels_for", lambda _: kernels)
            torch.testing.assert_close(ops.linear(x, layer.weight, layer.bias), want, **CLOSE[dtype])
        ops.linear(x, layer.weight, layer.bias).sum().backward()  # training keeps torch's, which has gradients
    assert taken == ["linear_row", "linear_rows"] and layer.weight.grad is not None


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 512), (37, 700)])
@pytest.mark.parametrize("rows", [1, 2, 10, 64, 65, 150])
@pytest.mark.parametrize("bias", [False, True])
def test_products_with_a_weight_in_eight_bits(dtype, outputs, inputs, rows, bias):
    x, (weight, scales) = randn(1, rows, inputs, dtype=dtype), press(randn(outputs, inputs) * randn(outputs, 1).exp())
    added = randn(outputs, dtype=dtype) if bias else None
    want = torch.nn.functional.linear(x.double(), weight.double() * scales, added if added is None else added.double())
    got = kernels.linear_rows(x, weight, added, scales)
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < (1e-4 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("size", [700, 2 * kernels.HALVED_AT_ONCE + 300])
def test_rows_are_halved_to_what_they_were(size):
    x = torch.cat([randn(3, size).exp() * randn(3, size), torch.zeros(1, size, device=DEVICE)])
    parts, steps = kernels._halved(x)
    back = (128 * parts[0].double() + parts[1]) * steps[:, None]
    assert ((back - x).abs() <= 0.501 * steps[:, None]).all()
    assert torch.equal(parts[0].abs().amax(1).long().cpu(), torch.tensor([127, 127, 127, 0]))
    assert (steps[:3] == x[:3].abs().amax(1) / 16256).all()


@torch.no_grad()
def test_more_rows_of_eight_bits_take_the_kernels(monkeypatch):
    """Else the whole matrix is made anew each time."""
    taken = []
    monkeypatch.setattr(kernels, "linear_rows", lambda x, *_: taken.append(x.shape[-2]))
    monkeypatch.setattr(ops, "kernels_for", lambda _: kernels)
    weight, scales = press(randn(8, 16))
    for rows in (1, 64, ops.STREAMED_INT8_ROWS):
        ops.linear(randn(1, rows, 16, dtype=torch.float16), weight, None, scales)
    many = ops.linear(randn(1, ops.STREAMED_INT8_ROWS + 1, 16, dtype=torch.float16), weight, None, scales)
    assert many.dtype == torch.float16
    assert ops.linear(randn(1, 3, 16), weight, None, scales).dtype == torch.float32
    assert taken == [1, 64, ops.STREAMED_INT8_ROWS]


def test_the_default_number_of_splits(monkeypatch):
    """As many programs as a device of 132 processors holds twice, and never more than 32 splits."""
    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(kernels, "_attend", Launch())
    monkeypatch.setattr(kernels, "_merge", Launch())
    monkeypatch.setattr(kernels, "_processors", lambda _: 132)
    for heads, kv_heads, nodes, columns in [(28, 4, 1, 1216), (28, 4, 1, 8256), (28, 4, 60, 8256), (32, 32, 1, 8256)]:
        keys = torch.empty(1, kv_heads, columns, 128, dtype=torch.float16)
        queries = torch.empty(1, heads, nodes, 128, dtype=torch.float16)
        seen = torch.ones(1, nodes, nodes, dtype=torch.bool)
        kernels.attend(queries, keys, keys, torch.tensor([columns - nodes]), seen, 1.0)
    assert [grid[2] for grid in grids if len(grid) == 3] == [19, 32, 9, 8]
