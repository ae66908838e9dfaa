"""What every trained method promises on every family, from the one list `METHODS`: being in it is being tested.

What is special to a method (its view, its formulas, its options) is in its own file.
"""

from __future__ import annotations

import functools

import pytest
import torch

import tiny
from oracle import CAPACITY, Ask, assert_exact, prompt, target
from speculens.checkpoints import LAYOUTS, load_drafter, save_drafter, save_published
from speculens.drafters import METHODS, TrainedDrafter
from speculens.engine import Engine
from speculens.sampling import Sampling
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from speculens.tree import TreeShape
from test_exactness import asks

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
