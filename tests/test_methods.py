"""What every trained method promises on every family, from the one list `METHODS`: being in it is being tested.

What is special to a method (its view, its formulas, its options) is in its own file.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from oracle import CAPACITY, Ask, assert_exact, oracle, prompt, target
from speculens.checkpoints import LAYOUTS, load_drafter, save_drafter, save_published
from speculens.drafters import METHODS, TrainedDrafter
from speculens.engine import Engine
from speculens.sampling import Sampling
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from speculens.tree import TreeShape
from test_exactness import asks
from test_grow import lines_of

TREE = TreeShape(num_steps=2, topk=3, num_draft_tokens=9)
LENGTHS = (12, 9, 7, 10)
PUBLISHED = {layout.method: name for name, layout in LAYOUTS.items()}
# What a method's published layout cannot say otherwise.
AS_PUBLISHED = {"hivis": {"border": "after"}}


@functools.cache
def drafter(method: str, family: str, *, published: bool = False) -> TrainedDrafter:
    """As training makes it for this target, with random weights everywhere, also where it would begin with zeros."""
    recipe = DrafterRecipe(
        method,
        input_norm=not published,
        tree=LAYOUTS[PUBLISHED[method]].tree if published else TREE,
        options=AS_PUBLISHED.get(method, {}) if published else {},
    )
    made = make_drafter(recipe, target(family)).to(target(family).dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in made.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1 + 0.1 * noise)
    return made


def drafts(guesser: TrainedDrafter, family: str) -> list[list[int]]:
    """The first trees on prompts with a picture, two and none (or one more), side by side in their slots."""
    made, prompts = target(family), [prompt(family, ask) for ask in asks(family)[:3]]
    teacher, session = made.session(slots=3, capacity=CAPACITY), guesser.session(made, slots=3, capacity=CAPACITY)
    roots = []
    for one in prompts:
        logits, features = teacher.prefill(one)
        roots.append(logits[0, -1].argmax())
        session.begin(features, roots[-1][None])
    return session.draft(torch.stack(roots)).tokens.tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_decoding_is_exact(method, family):
    """One picture, several, none and several turns: ragged prompts over two slots, equal to plain `generate`."""
    samplings = [Sampling(max_new_tokens=length) for length in LENGTHS]
    got = assert_exact(family, drafter(method, family), asks(family), samplings)
    for one in got:
        assert 0 < one.stats.num_drafter_rows <= one.stats.num_prompt_tokens


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_seed_draws_the_same_text_as_without_a_drafter(method, family):
    sampling, asked = Sampling(temperature=1.0, seed=5, max_new_tokens=12), prompt(family, Ask(images=2))
    mine, own = (
        Engine(target(family), one, capacity=CAPACITY).generate(asked, sampling).tokens
        for one in (drafter(method, family), None)
    )
    assert mine == own


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_saved_and_drafts_the_same(method, family, tmp_path):
    made = drafter(method, family)
    again = load_drafter(save_drafter(made, tmp_path), dtype=target(family).dtype)
    assert again.config == made.config
    assert drafts(again, family) == drafts(made, family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", PUBLISHED)
def test_it_goes_through_its_published_layout_and_drafts_the_same(method, family, tmp_path):
    made, lender = drafter(method, family, published=True), target(family)
    folder = save_published(made, PUBLISHED[method], tmp_path, lender)
    assert drafts(load_drafter(folder, dtype=lender.dtype, target=lender), family) == drafts(made, family)


# The drafter's own state


class Both:
    """Drafts the oracle's trees, so that paths are long, and lets another drafter's session see everything."""

    name = "both"

    def __init__(self, oracle: Any, followed: Any) -> None:
        self._oracle, self._followed, self.trees = oracle, followed, []

    def session(self, *args: Any) -> Both:
        self._inner = self._oracle.session(*args)
        self.nodes, self.state, self.nbytes = self._inner.nodes, None, 0
        return self

    def begin(self, features, first):
        self._inner.begin(features, first)
        self._followed.begin(features, first)

    def draft(self, roots, *_: object):
        self.trees.append(self._followed.draft(roots))
        return self._inner.draft(roots)

    def observe(self, hidden, tokens, counts, horizon=0):
        self._inner.observe(hidden, tokens, counts)
        self._followed.observe(hidden, tokens, counts)

    def settle(self, accepted):
        self._inner.settle(accepted)
        self._followed.settle(accepted)

    def free(self, row):
        self._inner.free(row)
        self._followed.free(row)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_drafts_while_decoding_equal_drafts_from_a_fresh_start(method, family):
    """What was accepted, in a batch, leaves a drafter in the state that the whole text would have led to.

    Also in a slot that took the row of one that ended.
    """
    asks, samplings = [Ask(), Ask(images=2, seed=1)], [Sampling(max_new_tokens=20)] * 2
    guesser = drafter(method, family)
    both = Both(oracle(family, asks, samplings), guesser.session(target(family), 2, CAPACITY))
    engine = Engine(target(family), both, slots=2, capacity=CAPACITY)
    running = [(engine.admit(prompt(family, ask), s).slot, ask) for ask, s in zip(asks, samplings, strict=True)]
    for _ in range(4):
        if len(both.trees) == 2:
            engine.cancel(running.pop(0)[0])
        before = [list(slot.tokens) for slot, _ in running]
        engine.step()
        for row, ((_, ask), tokens) in enumerate(zip(running, before, strict=True)):
            assert lines_of(both.trees[-1], row) == lines_of(fresh_draft(guesser, family, ask, tokens), 0)
    assert len(tokens) > 4


def fresh_draft(guesser, family, ask, tokens):
    """The tree on top of prompt and `tokens`, by one pass over all of it."""
    made_for, asked = target(family), prompt(family, ask)
    ids = torch.cat([asked.ids, torch.tensor(tokens[:-1], dtype=torch.long)])[None]
    inputs = {**asked.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = len(tokens) - 1
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, more))
    features = made_for.teach(inputs, torch.nn.functional.pad(asked.image, (0, more))[None])
    answer = torch.arange(ids.shape[1])[None] >= len(asked)  # a gate hears the question alone
    session = guesser.session(made_for, 1, CAPACITY)
    session.begin(replace(features, answer=answer), torch.tensor(tokens[-1:]))
    return session.draft(torch.tensor(tokens[-1:]))
