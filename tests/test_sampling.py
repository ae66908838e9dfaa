"""The law of the chosen token: Hugging Face's processors at every node, exact draws, and one text for one seed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from transformers import LogitsProcessor
from transformers.generation import logits_process

from laws import VOCAB, assert_pair_law, chosen, hugging_face
from oracle import CAPACITY, Ask, OracleDrafter, prompt, random_eagle, target
from speculens.drafters import LookupDrafter, NoDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import (
    STATEFUL_PROCESSORS,
    TOP_K_ROOMS,
    Laws,
    Needs,
    Sampling,
    _uniform,
    correct,
    gumbel,
    node_histories,
    warp,
)
from speculens.tree import DraftTree
from trees import line


def a_tree(generator: torch.Generator, batch: int, nodes: int) -> DraftTree:
    """Any tree; parents before children."""
    parents = torch.zeros(batch, nodes, dtype=torch.long)
    depth = torch.zeros(batch, nodes, dtype=torch.long)
    for node in range(1, nodes):
        parents[:, node] = torch.randint(node, (batch,), generator=generator)
        depth[:, node] = depth.gather(1, parents[:, node : node + 1])[:, 0] + 1
    tokens = torch.randint(VOCAB, (batch, nodes), generator=generator)
    return DraftTree.build(tokens, parents, depth, torch.ones_like(tokens, dtype=torch.bool), int(depth.max()))


def own_history(tree: DraftTree, slot: int, node: int, past: list[int]) -> list[int]:
    return past + [int(tree.tokens[slot, n]) for n in line(tree, slot, node)]


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 3, 10, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 1.5, 0.8]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 2, 3]),
)
pasts = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=9), min_size=3, max_size=3)


# The law


@given(samplings, pasts, st.integers(0, 2**32), st.booleans())
def test_processed_logits_equal_hugging_faces_at_every_node(sampling, past, seed, few):
    generator = torch.Generator().manual_seed(seed)
    tree = a_tree(generator, 3, 6)
    if few:  # few tokens: n-grams do repeat
        tree = replace(tree, tokens=tree.tokens % 3)
        past = [[token % 3 for token in row] for row in past]
    logits = torch.randn(3, 6, VOCAB, generator=generator) * 3
    ours = correct(logits, tree, [sampling] * 3, past)
    if sampling.temperature:
        ours = warp(ours, Laws.of([sampling] * 3, ours.device), Needs.of([sampling]))
    theirs = hugging_face(sampling)
    for slot in range(3):
        for node in range(6):
            ids = torch.tensor([own_history(tree, slot, node, past[slot])])
            assert torch.equal(ours[slot, node], theirs(ids, logits[slot, node][None])[0]), (slot, node)


@given(pasts, st.integers(0, 2**32))
def test_node_histories_are_committed_tokens_and_own_line(past, seed):
    tree = a_tree(torch.Generator().manual_seed(seed), 3, 7)
    tokens, lengths = node_histories(tree, past)
    for slot in range(3):
        for node in range(7):
            expected = own_history(tree, slot, node, past[slot])
            assert tokens[slot, node, : lengths[slot, node]].tolist() == expected
            assert (tokens[slot, node, lengths[slot, node] :] == -1).all()


def test_so_cold_that_division_would_overflow_is_greedy():
    assert Sampling(temperature=1e-40) == Sampling()
    assert Sampling(temperature=1e-4).temperature == 1e-4


@given(st.lists(samplings, min_size=1, max_size=4), st.integers(0, (1 << 31) - 1))
def test_kinds_of_steps_are_few_whatever_is_asked_and_have_room_for_it(mixed, top_k):
    mixed = [replace(one, top_k=top_k) for one in mixed]
    needs = Needs.of(mixed)
    assert needs.top_k in (0, *TOP_K_ROOMS)
    assert needs.top_k >= max((one.top_k for one in mixed if one.temperature), default=0)


LAWS = {
    "plain": Sampling(temperature=1.0),
    "warm, top-k and top-p": Sampling(temperature=1.4, top_k=8, top_p=0.9),
    "min-p": Sampling(temperature=1.2, min_p=0.08),
    "penalised": Sampling(temperature=0.8, repetition_penalty=1.5),
}


@pytest.mark.parametrize("law", LAWS)
def test_first_two_tokens_follow_hugging_faces_distribution(law):
    assert_pair_law(LAWS[law])


def test_mixed_settings_in_one_batch_equal_separate_runs():
    generator = torch.Generator().manual_seed(1)
    tree = a_tree(generator, 6, 5)
    logits = torch.randn(6, 5, VOCAB, generator=generator) * 3
    mixed = [
        Sampling(),
        Sampling(temperature=0.8, top_k=5, seed=4),
        Sampling(temperature=0.8, top_k=5, seed=9),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=1.5, top_p=0.8, min_p=0.02, no_repeat_ngram_size=2, seed=-3),
        Sampling(temperature=1.0, processors=(logits_process.SuppressTokensLogitsProcessor([0, 1, 2]),)),
    ]
    past = [[1] * n for n in range(6)]
    positions = torch.arange(6) * 3
    together = chosen(logits, tree, mixed, positions, past)
    for slot, sampling in enumerate(mixed):
        one = DraftTree.build(
            *(x[slot : slot + 1] for x in (tree.tokens, tree.parents, tree.depth, tree.live)), tree.levels
        )
        alone = chosen(logits[slot : slot + 1], one, [sampling], positions[slot : slot + 1], [past[slot]])
        assert torch.equal(alone[0], together[slot])


# The noise


def test_noise_is_standard_gumbel():
    noise = gumbel(torch.tensor([3]), torch.tensor([0]), 20_000)
    assert kstest(torch.exp(-torch.exp(-noise[0])), "uniform").pvalue > 0.001


def test_noise_differs_between_seeds_positions_and_tokens():
    noise = gumbel(torch.arange(-20, 20)[:, None], torch.arange(25), 50)
    assert noise.unique().numel() == noise.numel()
    flat = noise.reshape(-1, 50)
    correlation = torch.corrcoef(flat.T) - torch.eye(50)
    assert correlation.abs().max() < 0.15  # 1,000 draws a token: 4.7 standard errors


def test_noise_depends_on_nothing_but_seed_position_and_token():
    seeds, positions = torch.tensor([5, 8, -1]), torch.tensor([0, 70, 3])
    whole = gumbel(seeds[:, None], positions, 40)
    for i, seed in enumerate(seeds):
        for j, position in enumerate(positions):
            assert torch.equal(whole[i, j], gumbel(seed, position, 40))
            assert torch.equal(whole[i, j, :7], gumbel(seed, position, 7))


def test_extreme_bits_give_finite_noise():
    """All-zero and all-one bits must be neither probability 0 nor 1: infinite noise would choose impossible tokens."""
    uniform = _uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert ((uniform > 0) & (uniform < 1)).all()
    assert torch.isfinite(-torch.log(-torch.log(uniform))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sampling", [Sampling(temperature=5.0, top_k=3), Sampling(temperature=1.0)])
def test_impossible_tokens_are_never_drawn_from_coarse_logits(dtype, sampling):
    slots = 3000
    logits = torch.full((slots, 1, 200), -float("inf"))
    logits[..., 10:13] = torch.tensor([1.0, 2.0, 3.0])
    tree = DraftTree.root(torch.zeros(slots, dtype=torch.long))
    seeds = [replace(sampling, seed=seed) for seed in range(slots)]
    drawn = chosen(logits.to(dtype), tree, seeds, torch.zeros(slots, dtype=torch.long), [[]] * slots)
    assert set(drawn.flatten().tolist()) == {10, 11, 12}


# One text for one seed


MIXES = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=20, top_p=0.9),
    Sampling(temperature=1.3, min_p=0.05, repetition_penalty=1.2),
    Sampling(temperature=0.9, no_repeat_ngram_size=2, repetition_penalty=1.05, top_p=0.8),
]
SEEDS = 200
LENGTH = 6


@pytest.fixture(scope="module")
def without_drafter():
    return sampled(NoDrafter())


def sampled(drafter):
    requests = [prompt("llava", Ask(images=0, seed=seed % 3)) for seed in range(SEEDS)]
    settings = [replace(MIXES[seed % 4], seed=seed, max_new_tokens=LENGTH) for seed in range(SEEDS)]
    return Engine(target("llava"), drafter, slots=8, capacity=CAPACITY).generate_all(requests, settings)


@pytest.mark.parametrize("name", ["lookup", "eagle", "oracle"])
def test_two_hundred_seeds_give_the_same_tokens_with_any_drafter(name, without_drafter):
    script = [
        (prompt("llava", Ask(images=0, seed=seed % 3)).ids.tolist(), generation.tokens)
        for seed, generation in enumerate(without_drafter)
    ]
    drafters = {
        "lookup": LookupDrafter,
        "eagle": lambda: random_eagle("llava"),
        "oracle": lambda: OracleDrafter(script),
    }
    got = sampled(drafters[name]())
    assert [g.tokens for g in got] == [g.tokens for g in without_drafter]
    assert len({tuple(g.tokens) for g in got}) > 0.9 * SEEDS  # they are samples indeed
    if name == "oracle":
        assert sum(g.stats.num_accepted_tokens for g in got) > SEEDS


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_samples_with_a_picture_are_the_same_alone_and_in_a_batch(family):
    settings = [replace(MIXES[seed % 4], seed=seed, max_new_tokens=16) for seed in range(6)]
    requests = [prompt(family, Ask(seed=seed % 2)) for seed in range(6)]
    alone = [Engine(target(family), capacity=CAPACITY).generate(r, s) for r, s in zip(requests, settings, strict=True)]
    script = [(r.ids.tolist(), g.tokens) for r, g in zip(requests, alone, strict=True)]
    together = Engine(target(family), OracleDrafter(script), slots=3, capacity=CAPACITY).generate_all(
        requests, settings
    )
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert sum(g.stats.num_accepted_tokens for g in together) > 30


# Refusals


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1 << 31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ("",)}, "stop string"),
        ({"stop": "\n\n"}, "stop"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, word):
    with pytest.raises(UserError, match=word):
        Sampling(**settings)


@pytest.mark.parametrize("name", sorted(STATEFUL_PROCESSORS))
def test_stateful_processors_are_refused_by_name(name):
    stateful = type(name, (LogitsProcessor,), {})()
    with pytest.raises(UserError, match=name):
        Sampling(processors=(stateful,))


def test_stateful_processors_exist_under_these_names():
    """A renamed class would slip through."""
    known = {name for name in dir(logits_process) if name.endswith("Processor")}
    assert known >= STATEFUL_PROCESSORS


def test_subclasses_of_stateful_processors_are_refused():
    class Mine(logits_process.SynthIDTextWatermarkLogitsProcessor):
        def __init__(self):
            """Without the parent's arguments."""

    with pytest.raises(UserError, match="Mine"):
        Sampling(processors=(Mine(),))
