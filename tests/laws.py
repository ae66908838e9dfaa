"""Hugging Face's own distribution of a sampled token, and whether draws follow it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

import tiny
from speculens.sampling import Laws, Needs, Sampling, choose, correct
from speculens.tree import DraftTree

VOCAB = 24
DRAWS = 4000


def chosen(
    logits: Tensor, tree: DraftTree, samplings: Sequence[Sampling], position: Tensor, history: Sequence[Sequence[int]]
) -> Tensor:
    """What the engine does with logits: correct by the past, then choose."""
    laws = Laws.of(samplings, logits.device)
    return choose(correct(logits, tree, samplings, history), tree, laws, Needs.of(samplings), position)


class LawError(AssertionError):
    """Draws that do not follow their law."""


def hugging_face(settings: Sampling) -> LogitsProcessorList:
    """The processors that `generate` itself would run for these settings, in its order."""
    config = GenerationConfig(
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or 1.0,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p or None,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        num_beams=1,
    )
    return tiny.model("llava")._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=1,
        encoder_input_ids=torch.zeros(1, 1, dtype=torch.long),
        device="cpu",
    )


def assert_pair_law(settings: Sampling) -> None:
    """Draw two tokens along a drafted branch, for many seeds, and compare the first and the pair with their law."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(VOCAB, VOCAB, generator=generator) * 2  # row r: after token r
    past, root = [3, 7], 11
    theirs = hugging_face(settings)
    first = theirs(torch.tensor([[*past, root]]), logits[root][None]).softmax(-1)[0]
    second = torch.cat([theirs(torch.tensor([[*past, root, t]]), logits[t][None]).softmax(-1) for t in range(VOCAB)])

    tokens = torch.tensor([root, *range(VOCAB)]).expand(DRAWS, -1)  # every token is a child of the root
    depth = torch.tensor([0] + [1] * VOCAB).expand(DRAWS, -1)
    tree = DraftTree.build(tokens, torch.zeros_like(tokens), depth, torch.ones_like(tokens, dtype=torch.bool), 1)
    drawn = chosen(
        logits[tokens],
        tree,
        [replace(settings, seed=seed) for seed in range(DRAWS)],
        torch.zeros(DRAWS, dtype=torch.long),
        [past] * DRAWS,
    )
    one = drawn[:, 0]
    two = drawn.gather(1, one[:, None] + 1)[:, 0]
    _assert_law(one, first)
    _assert_law(one * VOCAB + two, (first[:, None] * second).flatten())


def _assert_law(drawn: Tensor, law: Tensor) -> None:
    """Nothing impossible is drawn, and the counts fit; rare outcomes are pooled to an expectation of 5 or more."""
    counts = torch.bincount(drawn, minlength=len(law)).double()
    expected = law.double() / law.double().sum() * len(drawn)
    if counts[expected == 0].sum():
        raise LawError("a token of probability 0 was drawn")
    often = expected >= 5
    observed, wanted = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    real = wanted > 0
    p = chisquare(observed[real], wanted[real]).pvalue
    if p < 0.001:
        raise LawError(f"the draws do not follow the law: p = {p:.1e}")
