"""Would the exactness tests notice? Each known way to be wrong is put in, and a check that passes without must fail."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings

import laws
import test_methods
import tiny
from oracle import Ask, NotExactError, assert_exact, compare, oracle, prompt, reference, target
from speculens import attention, sampling
from speculens import engine as engine_module
from speculens.cache import SlotCache
from speculens.capture import Recorder
from speculens.drafters import NoDrafter
from speculens.drafters.session import HeadSession
from speculens.engine import Engine
from speculens.loop import Loop, Outcome
from speculens.sampling import Sampling
from speculens.slot import Slot
from speculens.targets import Target, TargetSession
from speculens.tree import DraftTree
from test_capture import WIDE, Replica, guesser
from trees import assert_walks, trees_and_wants

LENGTH = 20
GREEDY = Sampling()
# Pulled towards repeating itself, and forbidden to.
PENALISED = Sampling(repetition_penalty=0.6, no_repeat_ngram_size=2)


# The checks: what test_exactness.py and test_sampling.py do, in small


def exact(family: str, law: Sampling = GREEDY, eos: tuple[int, ...] = (), guesser: type | None = None) -> None:
    """Ragged requests over two slots, with the oracle's trees."""
    asks = [Ask(images=2), Ask(turns=3, seed=1), Ask(images=2, seed=2), Ask(seed=3)]
    samplings = [replace(law, max_new_tokens=length) for length in (9, LENGTH, 15, 12)]
    drafter = guesser() if guesser else oracle(family, asks, samplings, levels=4)
    assert_exact(family, drafter, asks, samplings, slots=2, eos=eos)


def exact_with_end() -> None:
    text = reference("llava", Ask(images=2), Sampling(max_new_tokens=LENGTH))
    end = (text[7], text[12])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.model("llava").generation_config, "eos_token_id", list(end))
        exact("llava", eos=end)


def same_with_any_drafter() -> None:
    """Twelve seeds, once without a drafter and once with trees that hold that outcome."""
    asks = [Ask(images=0, seed=seed) for seed in range(12)]
    samplings = [Sampling(temperature=1.0, seed=seed, max_new_tokens=8) for seed in range(12)]
    prompts = [prompt("llava", ask) for ask in asks]
    alone = Engine(target("llava"), NoDrafter(), slots=4, capacity=128).generate_all(prompts, samplings)
    guesser = oracle("llava", asks, [Sampling()] * 12)
    guesser.script = [(p.ids.tolist(), g.tokens) for p, g in zip(prompts, alone, strict=True)]
    drafted = Engine(target("llava"), guesser, slots=4, capacity=128).generate_all(prompts, samplings)
    for one, other in zip(drafted, alone, strict=True):
        compare(one.tokens, other.tokens)


def replayed() -> None:
    """Steps as graphs would run them, with rows of padding, beside a prompt that is filled in piece by piece."""
    asks = [Ask(), Ask(seed=2), Ask(images=2, seed=1), Ask(images=3, turns=3, seed=3)]
    engine = Engine(target("llava"), guesser("eaglevlm", "llava"), slots=4, capacity=300, shape=WIDE, prefill_chunk=6)
    engine._recorder = Replica(engine)
    law = Sampling(max_new_tokens=LENGTH)
    slots = [engine.admit(prompt("llava", ask), law).slot for ask in asks[:3]]
    slots.append(engine.submit(prompt("llava", asks[3]), law))
    while engine.running or engine.pending:
        engine.step()
    for ask, slot in zip(asks, slots, strict=True):
        compare(slot.tokens, reference("llava", ask, law))


def replayed_queue() -> None:
    """Prompts that come while a round of others is under way."""
    asks = [Ask(), Ask(seed=2), Ask(images=2, seed=1), Ask(images=3, turns=3, seed=3)]
    samplings = [Sampling(max_new_tokens=length) for length in (9, LENGTH, 15, 12)]
    engine = Engine(target("llava"), guesser("eaglevlm", "llava"), slots=2, capacity=300, shape=WIDE)
    engine._recorder = Replica(engine)
    answers = engine.generate_all([prompt("llava", ask) for ask in asks], samplings)
    for ask, law, answer in zip(asks, samplings, answers, strict=True):
        compare(answer.tokens, reference("llava", ask, law))


def same_drafts() -> None:
    """What was accepted leaves the drafter as if it had read the whole text at once."""
    try:
        test_methods.test_drafts_while_decoding_equal_drafts_from_a_fresh_start("vispec", "llava")
    except AssertionError as error:
        raise NotExactError from error


def plain_walk() -> None:
    """Trees of few tokens: under a wrong parent, too, a node often agrees with its parent's want."""
    settings(phases=[Phase.generate])(given(trees_and_wants())(lambda pair: assert_walks(*pair)))()


def pair_law() -> None:
    laws.assert_pair_law(Sampling(temperature=1.0))


# The mutations


def change(owner: object, name: str) -> Callable:
    """Decorator: `wrong(right, *args)` takes the place of `owner.name`."""

    def decorate(wrong: Callable) -> Callable:
        def apply(patch: pytest.MonkeyPatch) -> None:
            right = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))

        apply.__doc__ = wrong.__name__.replace("_", " ")
        return apply

    return decorate


@change(attention, "tree_mask")
def siblings_see_each_other(right, lengths, ancestors, columns, *window: object):
    above = ancestors & ~torch.eye(ancestors.shape[1], dtype=torch.bool)
    siblings = (above[:, :, None] == above[:, None]).all(-1)
    return right(lengths, ancestors | siblings, columns, *window)


@change(attention, "tree_mask")
def all_nodes_see_each_other(right, lengths, ancestors, columns, *window: object):
    return right(lengths, torch.ones_like(ancestors), columns, *window)


@change(attention, "tree_mask")
def the_newest_row_of_the_prefix_is_hidden(right, lengths, ancestors, columns, *window: object):
    newest = torch.arange(columns) == lengths[:, None] - 1
    return right(lengths, ancestors, columns, *window) & ~newest[:, None]


@change(attention, "tree_mask")
def the_mask_begins_one_column_early(right, lengths, ancestors, columns, *window: object):
    return right(lengths - 1, ancestors, columns, *window)


@change(attention, "tree_mask")
def a_slot_sees_its_longer_neighbours_columns(right, lengths, ancestors, columns, *window: object):
    stale = torch.arange(columns) >= lengths[:, None] + ancestors.shape[1]
    return right(lengths, ancestors, columns, *window) | stale[:, None]


@change(attention, "tree_mask")
def the_sliding_window_is_forgotten(right, lengths, ancestors, columns, *_window: object):
    return right(lengths, ancestors, columns)


@change(TargetSession, "prefill")
def the_rope_delta_is_dropped(right, session, asked):
    result = right(session, asked)
    session._offsets.zero_()
    return result


@change(TargetSession, "prefill")
def the_rope_delta_is_the_last_requests(right, session, asked):
    result = right(session, asked)
    session._offsets[:] = session._offsets[session.cache.running - 1]
    return result


@change(TargetSession, "score")
def depth_is_not_added_to_positions(right, session, tree, horizon=0):
    return right(session, replace(tree, depth=torch.zeros_like(tree.depth)), horizon)


@change(SlotCache, "keep")
def accepted_rows_are_not_moved(right, cache, path, counts):
    right(cache, torch.arange(path.shape[1]).expand_as(path), counts)


@change(SlotCache, "keep")
def the_wrong_row_is_copied(right, cache, path, counts):
    right(cache, path.roll(1, dims=1), counts)


@change(SlotCache, "keep")
def one_row_too_few_is_committed(right, cache, path, counts):
    right(cache, path, counts - 1)


@change(SlotCache, "free")
def a_freed_row_keeps_its_length(right, cache, row):
    length = cache.lengths[row].clone()
    right(cache, row)
    cache.lengths[row] = length


@change(SlotCache, "free")
def a_freed_row_keeps_its_keys(right, cache, row):
    before = {device: block.clone() for device, block in cache._blocks.items()}
    right(cache, row)
    for device, block in before.items():
        cache._blocks[device].copy_(block)


@change(TargetSession, "free")
def a_freed_row_keeps_its_offset(right, session, row):
    offset = session._offsets[row].clone()
    right(session, row)
    session._offsets[row] = offset


@change(DraftTree, "follow")
def the_walk_ignores_ancestors(_right, tree, want):
    agrees = (tree.tokens == want.gather(1, tree.parents)) & tree.live
    agrees[:, 0] = True
    order = torch.where(agrees, tree.depth, tree.levels + 1)
    return order.argsort(dim=1, stable=True)[:, : tree.levels + 1], agrees.sum(1).clamp(max=tree.levels + 1)


@change(DraftTree, "follow")
def padding_is_accepted(right, tree, want):
    path, counts = right(replace(tree, live=torch.ones_like(tree.live)), want)
    return path, counts.clamp(max=path.shape[1])  # several children may be the wanted one


@change(DraftTree, "follow")
def the_walk_accepts_one_too_many(right, tree, want):
    path, counts = right(tree, want)
    return path, (counts + 1).clamp(max=path.shape[1])


@change(sampling, "gumbel")
def noise_does_not_depend_on_position(right, seed, position, vocab):
    return right(seed, torch.zeros_like(position), vocab)


@change(sampling, "gumbel")
def noise_does_not_depend_on_the_seed(right, seed, position, vocab):
    return right(torch.zeros_like(seed), position, vocab)


@change(sampling, "gumbel")
def noise_depends_on_the_tree(right, seed, position, vocab):
    return right(seed + position.shape[-1], position, vocab)


@change(sampling, "node_histories")
def penalties_ignore_the_line_of_a_node(right, tree, history):
    tokens, lengths = right(tree, history)
    return tokens[:, :1].expand_as(tokens), lengths[:, :1].expand_as(lengths)


@change(sampling, "node_histories")
def penalties_forget_the_prompt(right, tree, history):
    return right(tree, [past[-1:] for past in history])


@change(Slot, "take")
def only_the_end_of_a_path_is_checked_for_the_end_of_text(right, slot, tokens, ends):
    *before, last = tokens
    slot.tokens += before
    return [*before, *right(slot, [last], ends)]


@change(Loop, "step")
def rows_of_padding_advance(right, loop, *args: object):
    loop.front.live.fill_(True)
    return right(loop, *args)


@change(engine_module, "column_bucket")
def a_bucket_is_too_small_for_its_rows(_right, _columns, _most):
    return 32


@change(Recorder, "_restore")
def recording_leaves_its_traces(_right, _recorder, _kept): ...


@change(Outcome, "clone")
def results_are_left_where_other_graphs_write(_right, outcome):
    return outcome


@change(SlotCache, "commit")
def pieces_of_a_prompt_are_committed_too_late(right, cache, counts):
    right(cache, counts)
    if cache._filling and cache._high > 10:
        cache.lengths[cache.running] -= 2


@change(HeadSession, "observe")
def what_was_not_accepted_is_remembered(right, session, hidden, tokens, counts):
    right(session, hidden, tokens, torch.full_like(counts, tokens.shape[1]))


@change(HeadSession, "free")
def a_pictures_vector_stays_with_its_row(right, session, row):
    kept = session._memory.clone()
    right(session, row)
    session._memory.copy_(kept)


def only_one_end_id_is_known(patch: pytest.MonkeyPatch) -> None:
    known = Target.eos_token_ids.fget
    patch.setattr(Target, "eos_token_ids", property(lambda target: frozenset(sorted(known(target))[:1])))


@dataclass(frozen=True)
class Mutant:
    apply: Callable
    check: Callable
    args: tuple = ()

    def __str__(self) -> str:
        name = self.apply.__doc__ or self.apply.__name__.replace("_", " ")
        return f"{name} ({' '.join([self.check.__name__, *(a for a in self.args if isinstance(a, str))])})"


MUTANTS = [
    *(
        Mutant(apply, exact, ("llava",))
        for apply in (
            siblings_see_each_other,
            all_nodes_see_each_other,
            the_newest_row_of_the_prefix_is_hidden,
            the_mask_begins_one_column_early,
            a_slot_sees_its_longer_neighbours_columns,
            depth_is_not_added_to_positions,
            accepted_rows_are_not_moved,
            the_wrong_row_is_copied,
            one_row_too_few_is_committed,
            a_freed_row_keeps_its_length,
            a_freed_row_keeps_its_keys,
            padding_is_accepted,
            the_walk_accepts_one_too_many,
        )
    ),
    *(
        Mutant(apply, exact, (family,))
        for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma")
        for apply in (the_rope_delta_is_dropped, siblings_see_each_other)
    ),
    Mutant(the_rope_delta_is_the_last_requests, exact, ("qwen2_5_vl",)),
    Mutant(a_freed_row_keeps_its_offset, exact, ("qwen2_5_vl",)),
    Mutant(the_sliding_window_is_forgotten, exact, ("gemma3",)),
    Mutant(penalties_ignore_the_line_of_a_node, exact, ("llava", PENALISED)),
    Mutant(penalties_forget_the_prompt, exact, ("llava", PENALISED)),
    Mutant(only_the_end_of_a_path_is_checked_for_the_end_of_text, exact_with_end),
    Mutant(only_one_end_id_is_known, exact_with_end),
    *(
        Mutant(apply, plain_walk)
        for apply in (the_walk_ignores_ancestors, padding_is_accepted, the_walk_accepts_one_too_many)
    ),
    *(
        Mutant(apply, replayed)
        for apply in (
            rows_of_padding_advance,
            a_bucket_is_too_small_for_its_rows,
            recording_leaves_its_traces,
            pieces_of_a_prompt_are_committed_too_late,
        )
    ),
    Mutant(results_are_left_where_other_graphs_write, replayed_queue),
    Mutant(what_was_not_accepted_is_remembered, same_drafts),
    Mutant(a_pictures_vector_stays_with_its_row, same_drafts),
    Mutant(noise_does_not_depend_on_position, pair_law),
    Mutant(noise_does_not_depend_on_the_seed, pair_law),
    Mutant(noise_depends_on_the_tree, same_with_any_drafter),
    Mutant(siblings_see_each_other, same_with_any_drafter),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant, monkeypatch):
    mutant.apply(monkeypatch)
    with pytest.raises(laws.LawError if mutant.check is pair_law else NotExactError):
        mutant.check(*mutant.args)


@pytest.mark.parametrize(
    ("check", "args"),
    list(dict.fromkeys((mutant.check, mutant.args) for mutant in MUTANTS)),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_check_passes_without_mutation(check, args):
    check(*args)


def test_mutations_of_the_tree_are_invisible_without_drafts(monkeypatch):
    """Why the oracle is needed: a tree of one node has no siblings, no depth and no path to move."""
    siblings_see_each_other(monkeypatch)
    depth_is_not_added_to_positions(monkeypatch)
    accepted_rows_are_not_moved(monkeypatch)
    exact("llava", guesser=NoDrafter)
