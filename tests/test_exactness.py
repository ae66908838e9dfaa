"""Lossless: greedy decoding in float64 equals Hugging Face's `generate`, token for token, whatever the drafter."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import tiny
from oracle import (
    CAPACITY,
    DRAFTERS,
    FORESIGHT,
    Ask,
    assert_exact,
    compare,
    drafter,
    oracle,
    pooled_acceptance,
    prompt,
    reference,
)
from speculens.attention import folded_attention
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets import Target, attention
from speculens.targets.attention import install_attention

LENGTHS = (32, 26, 24, 29)
NO_TEXT_ONLY = ("paligemma", "paligemma2")  # their processor insists on a picture


def asks(family: str) -> list[Ask]:
    """One picture, several, none, and several turns: ragged prompts."""
    plain = Ask(seed=3) if family in NO_TEXT_ONLY else Ask(images=0, seed=3)
    return [Ask(), Ask(images=2, seed=1), plain, Ask(images=3, turns=3, seed=2)]


def settings(name: str) -> list[Sampling]:
    plain, penalised = Sampling(), Sampling(repetition_penalty=1.05, no_repeat_ngram_size=3)
    laws = {"plain": [plain] * 4, "penalised": [penalised] * 4, "mixed": [plain, penalised] * 2}[name]
    return [replace(law, max_new_tokens=length) for law, length in zip(laws, LENGTHS, strict=True)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    ("name", "setting"),
    [("none", "mixed"), ("lookup", "mixed"), ("eagle", "mixed"), ("oracle", "plain"), ("oracle", "penalised")],
)
def test_ragged_batch_admitted_and_freed_at_different_steps_equals_generate(family, name, setting):
    samplings = settings(setting)
    got = assert_exact(family, drafter(name, family, asks(family), samplings), asks(family), samplings)
    assert [len(g.tokens) for g in got] == list(LENGTHS)
    if name == "oracle":
        assert pooled_acceptance(got) > 2, "the oracle's drafts must be accepted, or this test shows nothing"


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_three_slots_shared_by_nine_requests_give_each_its_own_text(family):
    """Rows are freed and refilled in every order; nobody's outcome depends on a neighbour."""
    nine = [Ask(images=1 + i % 2, seed=i) for i in range(9)]
    samplings = [Sampling(max_new_tokens=length) for length in (3, 17, 9, 1, 24, 2, 11, 6, 15)]
    forward = assert_exact(family, oracle(family, nine, samplings), nine, samplings, slots=3)
    backward = assert_exact(family, oracle(family, nine, samplings), nine[::-1], samplings[::-1], slots=3)
    assert [g.text for g in forward] == [g.text for g in backward[::-1]]


@pytest.mark.parametrize("name", DRAFTERS)
def test_max_new_tokens_is_exact_at_every_length(name):
    lengths = [Sampling(max_new_tokens=length) for length in range(1, 13)]
    same = [Ask()] * len(lengths)
    got = assert_exact("llava", drafter(name, "llava", same, lengths), same, lengths, slots=3)
    assert [len(g.tokens) for g in got] == list(range(1, 13))
    assert {g.finish_reason for g in got} == {"length"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_text_ends_at_the_first_of_several_eos_ids_inside_an_accepted_path(family, name, monkeypatch):
    pair, samplings = [Ask(), Ask(seed=1)], [Sampling(max_new_tokens=30)] * 2
    texts = [reference(family, ask, sampling) for ask, sampling in zip(pair, samplings, strict=True)]
    eos = (texts[0][14], texts[1][9], texts[1][19])
    guesser = drafter(name, family, pair, samplings)  # an oracle that knows how the text would go on
    monkeypatch.setattr(tiny.model(family).generation_config, "eos_token_id", list(eos))
    got = assert_exact(family, guesser, pair, samplings, eos=eos)
    for generation in got:
        assert generation.finish_reason == "stop"
        assert generation.tokens[-1] in eos
        assert not set(generation.tokens[:-1]) & set(eos)


def test_ignore_eos_goes_on_to_the_full_length(monkeypatch):
    sampling = Sampling(max_new_tokens=20, ignore_eos=True)
    text = reference("llava", Ask(), sampling)
    monkeypatch.setattr(tiny.model("llava").generation_config, "eos_token_id", text[3:6])
    (got,) = assert_exact("llava", oracle("llava", [Ask()], [sampling]), [Ask()], [sampling])
    assert (len(got.tokens), got.finish_reason) == (20, "length")


def straddling_strings(family: str, ask: Ask) -> list[str]:
    """Strings of a reference text that begin in one token and end in the next."""
    words = tiny.tokenizer(family)
    pieces = [words.decode([token]) for token in reference(family, ask, Sampling(max_new_tokens=32))]
    printable = [piece if piece.isprintable() and "\ufffd" not in piece else "" for piece in pieces]
    pairs = [(a, b) for a, b in itertools.pairwise(printable[4:]) if a and b]
    return [a[-2:] + b[:1] for a, b in pairs]


@pytest.mark.parametrize("name", DRAFTERS)
def test_text_ends_with_the_token_that_completes_a_stop_string(name):
    tried = 0
    for ask in (Ask(seed=seed) for seed in range(4)):
        for stop in straddling_strings("llava", ask)[:2]:
            sampling = Sampling(max_new_tokens=32, stop=("no such string", stop))
            (got,) = assert_exact("llava", drafter(name, "llava", [ask], [sampling]), [ask], [sampling])
            assert got.finish_reason == "stop"
            assert stop in got.text
            tried += 1
    assert tried >= 4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_eager_attention_is_as_exact_as_sdpa(family):
    sampling = Sampling(max_new_tokens=24)
    eager = Target(tiny.model(family, attn="eager"), tiny.processor(family))
    engine = Engine(eager, oracle(family, [Ask()], [sampling]), capacity=CAPACITY)
    compare(engine.generate(prompt(family, Ask()), sampling).tokens, reference(family, Ask(), sampling), family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_our_attention_is_as_exact_as_sdpa(family):
    """What `load_target` switches on. Every family here has two query heads to a KV head: the fold does something."""
    model = copy.deepcopy(tiny.model(family))
    uses_sdpa = model.get_decoder().config._attn_implementation == "sdpa"
    install_attention(model)
    assert (model.get_decoder().config._attn_implementation == attention.NAME) == uses_sdpa
    sampling = Sampling(max_new_tokens=24)
    engine = Engine(Target(model, tiny.processor(family)), oracle(family, [Ask()], [sampling]), capacity=CAPACITY)
    compare(engine.generate(prompt(family, Ask()), sampling).tokens, reference(family, Ask(), sampling), family)


@pytest.mark.parametrize("folded", [False, True], ids=["mask of the nodes", "mask folded beforehand"])
def test_folded_attention_equals_attention_with_repeated_keys(folded):
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 5), (2, 9), (2, 9))
    query, key, value = (torch.randn(2, heads, rows, 8, generator=generator) for heads, rows in sizes)
    mask = torch.zeros(2, 1, 5, 9).masked_fill(torch.rand(2, 1, 5, 9, generator=generator) < 0.4, -1e9)
    given = mask.repeat(1, 1, 3, 1) if folded else mask
    mixed = folded_attention(query, key, value, given, scale=0.3)
    repeated = (states.repeat_interleave(3, 1) for states in (key, value))
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(mixed, plain)


def test_a_mask_for_other_rows_is_refused():
    """Two heads a group and a mask for half of the rows: repeated, it would have fitted."""
    query, key = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="a mask of 2 rows is none for 4 rows"):
        folded_attention(query, key, key, torch.ones(1, 1, 2, 6, dtype=torch.bool))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_picture_and_penalty_do_change_the_text(family):
    """Otherwise the tests above would show nothing about them."""
    plain, penalised = settings("plain")[0], settings("penalised")[0]
    assert reference(family, Ask(), plain) != reference(family, Ask(images=2), plain)
    long = replace(penalised, max_new_tokens=FORESIGHT)
    assert any(
        reference(family, ask, long) != reference(family, ask, replace(plain, max_new_tokens=FORESIGHT))
        for ask in asks(family)
    )


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen3_5", "layers of the kind linear_attention"),
        ("llama4", "layers of the kind chunked_attention"),
        ("mllama", "cross-attention"),
        ("florence2", "cross-attention"),
        ("kosmos-2", "one list of layers"),
        ("gemma4", "layers of several shapes"),
    ],
)
def test_models_of_another_build_are_refused_with_the_reason(kind, why):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind]())
    with pytest.raises(UserError, match=f"'{kind}' model cannot be a target: .*{why}"):
        Target(model)


def test_a_decoder_that_takes_more_of_a_token_than_its_embedding_is_refused():
    """As Gemma 3n's, whose tower needs a library that is not here: what its config says, on another model."""
    model = copy.deepcopy(tiny.model("llava"))
    more = CONFIG_MAPPING["gemma3n"]().get_text_config().hidden_size_per_layer_input
    model.config.get_text_config().hidden_size_per_layer_input = more
    with pytest.raises(UserError, match=r"cannot be a target: .*inputs of every layer by token id"):
        Target(model)
