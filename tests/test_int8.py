"""Drafters in 8 bits: what they stand for, that they draft just that, and that nothing else about them changes."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle import CAPACITY, Ask, assert_exact, prompt, target
from speculens.checkpoints import load_drafter, ours, save_drafter
from speculens.drafters import METHODS, NoDrafter, session
from speculens.engine import Engine
from speculens.int8 import AT_ONCE, Int8Linear, press, pressed, restored, widened
from speculens.ops import Joined, linear, project
from speculens.sampling import Sampling
from test_methods import drafter


def in_eight_bits(method, family="llava"):
    made = copy.deepcopy(drafter(method, family))
    made.press()
    return made


def rounded(made):
    """The same drafter of plain matrices that are what 8 bits stand for."""
    plain = copy.deepcopy(made)
    plain.load_state_dict(restored(pressed(plain.state_dict())))
    return plain


def trees(guesser, family="llava"):
    """Every tree over some answers, level by level, and the answers."""
    engine = Engine(target(family), guesser, slots=2, capacity=CAPACITY)
    return [
        (step.tokens, None if step.tree is None else step.tree.tokens.tolist())
        for ask in (Ask(), Ask(images=2, seed=1))
        for step in engine.stream(prompt(family, ask), Sampling(max_new_tokens=10))
    ]


# The layer


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_a_layer_computes_what_its_matrix_stands_for(outputs, inputs, rows, bias):
    torch.manual_seed(outputs * inputs + rows)
    layer, x = torch.nn.Linear(inputs, outputs, bias=bias).double(), torch.randn(rows, inputs, dtype=torch.float64)
    small = Int8Linear(layer)
    layer.weight.data = restored(pressed({"w": layer.weight.data}))["w"].double()
    for got in (small(x), project(small, x), linear(x, small.weight, small.bias, small.scales)):
        torch.testing.assert_close(got, layer(x), rtol=1e-6, atol=1e-6)


def test_a_large_matrix_is_pressed_piece_by_piece_to_the_same_numbers(monkeypatch):
    weight = torch.randn(37, 19)
    whole = press(weight)
    monkeypatch.setattr("speculens.int8.AT_ONCE", 19 * 4)
    assert all(map(torch.equal, press(weight), whole))
    monkeypatch.setattr("speculens.int8.AT_ONCE", 1)
    assert all(map(torch.equal, press(weight), whole))
    assert AT_ONCE > 1 << 20


def test_scales_stay_as_they_are_whatever_a_drafter_is_cast_to():
    layer = Int8Linear(torch.nn.Linear(6, 4))
    scales, weight = layer.scales.clone(), layer.weight.clone()
    layer.to(torch.bfloat16).to(torch.float64)
    assert layer.scales.equal(scales) and layer.scales.dtype == torch.float32
    assert layer.weight.equal(weight) and layer.weight.dtype == torch.int8
    assert layer.bias.dtype == torch.float64


def test_layers_in_eight_bits_are_joined_like_others():
    layers, x = [Int8Linear(torch.nn.Linear(6, size)) for size in (4, 3, 5)], torch.randn(2, 6)
    want = torch.cat([layer(x) for layer in layers], -1)
    joined = Joined(layers)
    assert joined.weight is not None and joined.weight.dtype == torch.int8 and joined.intact
    torch.testing.assert_close(joined(x), want)
    torch.testing.assert_close(torch.cat([layer(x) for layer in layers], -1), want)
    assert not Joined.possible([layers[0], torch.nn.Linear(6, 3)])


# Drafters


@pytest.mark.parametrize("method", METHODS)
def test_a_drafter_drafts_what_its_rounded_matrices_draft(method, monkeypatch):
    mine = trees(in_eight_bits(method))
    head = copy.deepcopy(target("llava").head)
    head.weight.data = widened(*press(head.weight), head.weight.dtype)
    monkeypatch.setattr(session, "_head", lambda *_: head)
    assert mine == trees(rounded_layers(drafter(method, "llava")))
    assert any(tree for _, tree in mine)


def rounded_layers(made):
    """Only what `press` holds in 8 bits is rounded: a picture's compressor reads its matrices once, and keeps them."""
    plain, small = copy.deepcopy(made), copy.deepcopy(made)
    small.press()
    plain.load_state_dict({**plain.state_dict(), **small.state_dict()})
    return plain


@pytest.mark.parametrize("method", METHODS)
def test_decoding_is_exact(method):
    asks = [Ask(), Ask(images=0, seed=1), Ask(images=2, seed=2)]
    assert_exact("llava", in_eight_bits(method), asks, [Sampling(max_new_tokens=length) for length in (9, 5, 12)])


@pytest.mark.parametrize("method", METHODS)
def test_all_that_a_level_reads_is_in_eight_bits_and_nothing_else(method):
    made = in_eight_bits(method)
    kinds = {name: type(part) for name, part in made.named_modules() if hasattr(part, "in_features")}
    level = {name for name in kinds if name.startswith("layers.") or name in {"fc", "img_fc"}}
    assert {kinds[name] for name in level} == {Int8Linear}
    assert Int8Linear not in {kinds[name] for name in kinds.keys() - level}
    assert made.is_pressed and not drafter(method, "llava").is_pressed
    assert made.describe() == {**drafter(method, "llava").describe(), "int8": True}


def test_pressing_a_drafter_that_has_decoded_takes_effect():
    made = copy.deepcopy(drafter("eaglevlm", "llava"))
    before = made.fused()
    made.press()
    assert made.fused() is not before
    assert made.fused() is made.fused()


@pytest.mark.parametrize("tokens", [None, torch.arange(3, 300)], ids=["all", "reduced"])
@pytest.mark.parametrize("method", ["eaglevlm", "hivis"])
def test_it_drafts_by_a_head_in_eight_bits(method, tokens):
    made = in_eight_bits(method)
    if tokens is not None:
        made = made.trimmed(tokens)
        assert not made.is_pressed, "it is made of what 8 bits stand for"
        made.press()
    lender = target("llava")
    mine = made.session(lender, slots=1, capacity=CAPACITY)._head
    head = lender.head if tokens is None else lender.head_rows(tokens)
    assert torch.equal(widened(mine.weight, mine.scales, torch.float64), widened(*press(head.weight), torch.float64))
    drafted = [tree for _, tree in trees(made) if tree]
    assert set(itertools.chain(*(tree[0][1:] for tree in drafted))) <= set(
        (torch.arange(401) if tokens is None else tokens).tolist()
    )


def test_a_head_that_is_no_plain_layer_stays_the_targets():
    lender = copy.copy(target("llava"))
    lender.head = torch.nn.Sequential(lender.head)
    lender.head.weight = lender.head[0].weight
    assert in_eight_bits("eaglevlm").session(lender, slots=1, capacity=CAPACITY)._head is None


# Stored


@pytest.mark.parametrize("method", METHODS)
def test_it_is_saved_as_what_it_stands_for(method, tmp_path):
    made = in_eight_bits(method)
    plain = drafter(method, "llava")
    assert made.state_dict().keys() == plain.state_dict().keys()
    again = load_drafter(save_drafter(made, tmp_path), dtype=torch.float64)
    assert not again.is_pressed
    again.press()
    assert trees(again) == trees(made)


@pytest.mark.parametrize("int8", [None, True, False])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_it_is_loaded_in_eight_bits_where_that_is_asked_for_or_stored_and_faster(
    int8, stored, fast, tmp_path, monkeypatch
):
    made = drafter("eaglevlm", "llava")
    folder = save_drafter(made, tmp_path, int8=stored)
    monkeypatch.setattr(ours, "_reads_int8", lambda *_: fast)
    loaded = load_drafter(folder, dtype=torch.float64, int8=int8)
    assert loaded.is_pressed == ((stored and fast) if int8 is None else int8)
    if loaded.is_pressed:
        assert trees(loaded) == trees(in_eight_bits("eaglevlm"))
    else:
        assert trees(loaded) == trees(rounded(made) if stored else made)


@pytest.mark.parametrize(
    ("device", "dtype", "faster"),
    [
        ("cuda:1", torch.bfloat16, True),
        (torch.device("cuda"), torch.float16, True),
        ("cuda", torch.float32, False),
        ("cuda", None, False),
        ("cpu", torch.bfloat16, False),
        (None, torch.bfloat16, False),
    ],
)
def test_eight_bits_are_faster_on_a_gpu_in_half_precision(device, dtype, faster):
    assert ours._reads_int8(device, dtype) == faster


def test_drafters_without_weights_have_no_bits():
    assert isinstance(load_drafter("none", int8=True), NoDrafter)
