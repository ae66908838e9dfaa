"""A step is the same tensor operations on the same buffers each time: what CUDA graphs need, shown without a GPU."""

import functools
import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from graphs import Again
from oracle import CAPACITY, Ask, oracle, prompt, target
from speculens.capture import WARM_UPS, Place, Recorder, column_bucket, row_bucket
from speculens.costs import Costs
from speculens.drafters import METHODS, LookupDrafter, NoDrafter
from speculens.engine import WARM, Engine
from speculens.loop import Bucket
from speculens.plan import ROOMY, Planner, ladder
from speculens.sampling import Needs, Sampling
from speculens.slot import Slot
from speculens.targets import prompt_graphs
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from speculens.tree import TreeShape

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "paligemma2"]
DRAFTERS = ["none", *METHODS]
PAIRS = [*zip(DRAFTERS, [*FAMILIES, "llava"], strict=True), ("eaglevlm", "paligemma2"), ("none", "gemma3")]
# Every likely token is a child of the root: paths of two and more are accepted, also from random drafters.
WIDE = TreeShape(num_steps=1, topk=40, num_draft_tokens=80)
MIXED = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=4),
    Sampling(temperature=1.2, min_p=0.05, seed=5),
]
SETTINGS = {"greedy": [Sampling()] * 4, "mixed": MIXED}
LENGTHS = (9, 4, 7, 11)


@functools.cache
def guesser(method, family):
    if method == "none":
        return NoDrafter()
    torch.manual_seed(7)
    drafter = make_drafter(DrafterRecipe(method), target(family)).to(target(family).dtype)
    return drafter.eval().requires_grad_(False)


def requests(family):
    asks = [Ask(), Ask(images=2, seed=1), Ask(seed=2), Ask(images=3, turns=3, seed=3)]
    return [prompt(family, ask) for ask in asks]


def engine_for(method, family, slots=4, **options: object):
    return Engine(target(family), guesser(method, family), slots=slots, capacity=CAPACITY, shape=WIDE, **options)


def texts(engine, family, setting):
    samplings = [replace(s, max_new_tokens=n) for s, n in zip(SETTINGS[setting], LENGTHS, strict=True)]
    return [generation.tokens for generation in engine.generate_all(requests(family), samplings)]


# No host read, nothing made from the host's numbers


class HostWorkError(AssertionError):
    """A step did what cannot be part of a graph."""


class DeviceOnly(TorchDispatchMode):
    """Raises on operations that read back, whose result's shape depends on data, or that copy the host's numbers."""

    FORBIDDEN = frozenset(
        [
            "_local_scalar_dense",
            "item",
            "nonzero",
            "nonzero_static",
            "masked_select",
            "lift_fresh",
            "lift_fresh_copy",
            "bincount",
            "_unique2",
            "unique_dim",
            "repeat_interleave",
            "equal",
            "is_nonzero",
        ]
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            raise HostWorkError(name)
        by_index = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if any(index is not None and index.dtype == torch.bool for index in by_index):
            raise HostWorkError(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: bool((x > 1).all()),
        lambda x: x[x > 1],
        lambda x: x + torch.tensor([1, 2, 3]),
        lambda x: x.nonzero(),
        lambda x: torch.nn.functional.one_hot(x, 9),
        lambda x: torch.ones(3).repeat_interleave(x),
        lambda x: list(x)[int(x[1])],
    ],
)
def test_the_check_sees_work_of_the_host(wrong):
    with pytest.raises(HostWorkError), DeviceOnly():
        wrong(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_a_step_never_asks_the_device(method, family):
    engine = engine_for(method, family)
    for asked, sampling in zip(requests(family)[:3], MIXED, strict=False):
        engine.admit(asked, replace(sampling, max_new_tokens=20))
    for needs in (Needs(), Needs.of(MIXED)):
        for horizon in (0, 256):
            with DeviceOnly():
                outcome = engine._loop.step(Bucket(4 if horizon else 3, needs, horizon=horizon))
            accepted = [row[1 : 1 + row[0]] for row in outcome.table[:3].tolist()]
            engine._target.settle([len(tokens) for tokens in accepted])
            engine._drafter.settle(accepted)


# Nothing but the buffers is carried from step to step


def _tensors(outcome):
    tree = outcome.tree
    parts = (tree.tokens, tree.parents, tree.depth, tree.live, tree.ancestors, outcome.table, outcome.along)
    return [part for part in parts if part is not None]


class Replica(Recorder):
    """Stands for graphs where there is no GPU: a replay runs the work again, while the host's side knows nothing.

    It writes over what the last one gave. So does every prompt, as if it were a graph that was recorded before: they
    share a pool, and whichever is recorded later may put its results into what the other one works with.
    """

    def __init__(self, engine):
        super().__init__(engine._loop.step, engine._loop.state)
        self.on, self.engine = True, engine
        self.held, self.spoilt = {}, 0
        self.own, engine._target.pieces = engine._target.pieces, self._pieces

    def _pieces(self, asked, size=None):
        buffers = {part.untyped_storage().data_ptr() for part in self._state}  # which results may be views of
        for outcome in self.held.values():
            for part in _tensors(outcome):
                if part.untyped_storage().data_ptr() not in buffers:
                    part.fill_(1)
        self.spoilt += self.engine._under_way is not None
        return self.own(asked, size)

    def _record(self, key, kept):
        for _ in range(2):  # what recording runs must leave no trace
            with self._ignorant():
                self._work(key)
        return None, None

    def replay(self, key):
        self.replays += 1
        assert key in self
        with self._ignorant():
            outcome = self._work(key)
        held = self.held.setdefault(key, outcome)
        for old, new in zip(_tensors(held), _tensors(outcome), strict=True):
            old.copy_(new)  # of one shape: that which it was recorded with
        return held

    @contextmanager
    def _ignorant(self):
        engine = self.engine
        caches = [engine._target.cache, *([engine._drafter.cache] if hasattr(engine._drafter, "cache") else [])]
        known = [(cache, cache.extents, cache.running) for cache in caches]
        running, engine._running = engine._running, None
        for cache in caches:
            cache.extents, cache.running = [10**9] * engine.slots, None
        try:
            yield
        finally:
            engine._running = running
            for cache, extents, rows in known:
                cache.extents, cache.running = extents, rows


def replaying(method, family, **options: object):
    engine = engine_for(method, family, **options)
    engine._recorder = Replica(engine)
    return engine


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_replayed_steps_give_the_tokens_of_eager_ones(method, family, setting):
    """Ragged slots that end at different steps, with rows of padding; recording happens in the middle of texts."""
    eager = texts(engine_for(method, family, slots=3), family, setting)
    engine = replaying(method, family, slots=4)
    assert texts(engine, family, setting) == eager
    recorder = engine._recorder
    assert recorder.replays >= max(LENGTHS) / 2
    assert 4 in {key.rows for key in recorder._graphs}, "three slots need a row of padding"


def test_settings_with_a_past_run_eagerly_and_the_others_go_on_as_graphs():
    family, law = "llava", Sampling(repetition_penalty=1.3, no_repeat_ngram_size=2, max_new_tokens=10)
    alone = engine_for("eaglevlm", family).generate(requests(family)[0], law).tokens
    engine = replaying("eaglevlm", family, slots=2)
    plain, penalised = engine.generate_all(requests(family)[:2][::-1], [Sampling(max_new_tokens=20), law])
    assert penalised.tokens == alone
    assert engine._recorder.replays
    assert {"draft", "score", "choose", "observe", "step"} <= set(plain.stats.seconds)
    slot = engine.admit(requests(family)[0], law).slot
    while engine.running:
        assert {step.slot for step in engine.step()} == {slot}
        assert engine._under_way is None, "it would be launched kernel by kernel before this step is told"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("method", ["none", "eaglevlm"])
def test_a_tree_stands_on_the_token_before_it(method, recorded):
    engine = (replaying if recorded else engine_for)(method, "llava", slots=2)
    first, *steps = engine.stream(requests("llava")[0], Sampling(max_new_tokens=8))
    before = first.tokens[-1]
    for step in steps:
        assert step.tree.tokens[0, 0] == before
        before = step.tokens[-1]


# The next round begins before this one's text is made


def test_a_round_is_under_way_while_the_last_ones_text_is_made_and_while_the_caller_has_it(monkeypatch):
    engine, begun = replaying("eaglevlm", "llava", slots=2), []
    own = Slot.say
    monkeypatch.setattr(Slot, "say", lambda slot: begun.append(engine._recorder.replays) or own(slot))
    seen = [engine._recorder.replays for _ in engine.stream(requests("llava")[0], Sampling(max_new_tokens=12))]
    assert begun == seen == [0, *range(2, len(seen)), len(seen) - 1]
    assert engine._under_way is None


def trees_and_logprobs(engine, family):
    """Of every step, by slot; rounds of three slots that end one after another."""
    told = {}
    samplings = [replace(s, max_new_tokens=n, logprobs=2) for s, n in zip(MIXED, LENGTHS, strict=True)]

    def note(number, step):
        tree = [] if step.tree is None else [step.tree.tokens[step.tree.live], step.tree.parents[step.tree.live]]
        told.setdefault(number, []).append((step.text, step.logprobs, *(part.tolist() for part in tree)))

    engine.generate_all(requests(family), samplings, note)
    return told


@pytest.mark.parametrize(("method", "family"), [("eaglevlm", "llava"), ("hivis", "qwen2_5_vl")])
def test_what_a_step_tells_is_its_own_though_the_next_round_is_under_way(method, family):
    want = trees_and_logprobs(engine_for(method, family, slots=3), family)
    engine = replaying(method, family, slots=3)
    assert trees_and_logprobs(engine, family) == want
    assert engine._recorder.spoilt, "a prompt came while a round was under way"


@pytest.mark.parametrize("late", [False, True], ids=["", "and another comes"])
@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_slot_is_cancelled_while_its_round_is_under_way(leaver, late):
    """The others' rows move before that round is read; of what it brings the cancelled one nothing is kept."""
    family, law = "qwen2_5_vl", Sampling(max_new_tokens=24)
    alone = [engine_for("eaglevlm", family).generate(one, law).tokens for one in requests(family)]
    engine = replaying("eaglevlm", family, slots=3)
    slots = [engine.admit(one, law).slot for one in requests(family)[:3]]
    engine.step()
    others = [row for row in range(3) if row != leaver]
    while len(set(engine._under_way.outcome.table[others, 0].tolist())) == 1:
        engine.step()
    kept = len(slots[leaver].tokens)
    engine.cancel(slots[leaver])
    if late:
        slots.append(engine.admit(requests(family)[3], law).slot)
        assert slots[3] not in [step.slot for step in engine.step()], "it waits for the next round"
    while engine.running:
        engine.step()
        ahead = engine._under_way.outcome.table[:, 0] if engine._under_way else torch.zeros(0).long()
        for cache in (engine._target.cache, engine._drafter.cache):
            known = torch.tensor(cache.extents)
            known[: len(ahead)] += ahead
            assert cache.lengths.tolist() == known.tolist()
    assert [len(slots[leaver].tokens), slots[leaver].finish_reason] == [kept, "cancelled"]
    for number, slot in enumerate(slots):
        assert slot.tokens == (alone[number][:kept] if number == leaver else alone[number])


def test_a_round_whose_slots_have_all_gone_is_not_read():
    """So whoever runs beside it gets a round of its own."""
    family, law = "llava", Sampling(max_new_tokens=12)
    alone = [engine_for("eaglevlm", family).generate(one, law).tokens for one in requests(family)[:3]]
    engine = replaying("eaglevlm", family, slots=3)
    for others in ([], requests(family)[1:3]):
        steps = engine.stream(requests(family)[0], law)
        for _ in range(3):
            next(steps)
        assert engine._under_way
        slots = [engine.admit(one, law).slot for one in others]  # they run beside a round that is not theirs
        steps.close()
        assert slots or engine._under_way is None, "an idle engine holds nothing of what has gone"
        assert {step.slot for step in engine.step()} == {*slots}
        while engine.running:
            engine.step()
        assert [slot.tokens for slot in slots] == alone[1 : 1 + len(slots)]
    assert engine.generate(requests(family)[0], law).tokens == alone[0]


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_stop_strings_end_a_slot_before_the_next_round_begins(stop):
    family = "llava"
    eager = engine_for("eaglevlm", family)
    text = eager.generate(requests(family)[0], Sampling(max_new_tokens=12)).text
    law = Sampling(max_new_tokens=12, stop=(text[stop : stop + 3],))
    want, got = (one.generate(requests(family)[0], law) for one in (eager, replaying("eaglevlm", family)))
    assert (got.tokens, got.text, got.finish_reason) == (want.tokens, want.text, want.finish_reason)
    assert want.finish_reason == "stop"


def test_a_prompt_that_waits_goes_before_the_next_round():
    law = Sampling(max_new_tokens=12)
    engine = replaying("none", "llava", slots=2, prefill_chunk=8)
    engine.admit(requests("llava")[0], law)
    engine.step()
    assert engine._under_way
    engine.submit(requests("llava")[1], law)
    for _ in range(2):
        engine.step()
        assert engine.pending
        assert not engine._under_way


def test_a_drafter_that_works_on_the_host_is_never_recorded():
    for drafter in (LookupDrafter(), oracle("llava", [Ask()], [Sampling()])):
        engine = Engine(target("llava"), drafter, capacity=CAPACITY)
        assert engine._loop.state is None
        assert not Recorder(engine._loop.step, engine._loop.state).on


# Short prompts


class Watched(Again):
    def again(self, key):
        with DeviceOnly():
            return super().again(key)


def let_prompts_be_recorded(monkeypatch):
    monkeypatch.setattr(prompt_graphs, "Recorder", Watched)
    monkeypatch.setattr(prompt_graphs, "GRAIN", 32)


@pytest.fixture
def recorded_prompts(monkeypatch):
    """An engine whose passes over short prompts are recorded."""
    let_prompts_be_recorded(monkeypatch)

    def make(family, **options: object):
        engine = engine_for("eaglevlm", family, **options)
        for record in engine._target.recordings(engine._recorder.place):
            assert record()
        return engine

    return make


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_recorded_prompts_give_the_tokens_of_eager_ones(recorded_prompts, family):
    """Ragged prompts into every row, rows freed and filled anew, and a prompt that overflowed before."""
    asked = [*requests(family), *requests(family)]
    samplings = [Sampling(max_new_tokens=LENGTHS[i % 4], temperature=i % 2, seed=i) for i in range(len(asked))]
    eager, engine = engine_for("eaglevlm", family, slots=3), recorded_prompts(family, slots=3)
    graphs = engine._target._graphs
    graphs._rows.embeds.fill_(float("nan"))
    texts = [[one.tokens for one in each.generate_all(asked, samplings)] for each in (eager, engine)]
    assert texts[0] == texts[1]
    plain = sum(len(prompt) <= graphs.sizes[0] and family != "qwen3_vl" for prompt in asked)  # deepstack is not plain
    assert graphs.recorder.replays == plain


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_recorded_prompt_touches_its_own_row_alone(recorded_prompts, row):
    engine = recorded_prompts("llava", slots=3)
    session, cache = engine._target, engine._target.cache
    prompts = requests("llava")[:3]
    earlier = [session.prefill(prompt)[1] for prompt in prompts[:row]]
    given = [features.hidden.clone() for features in earlier]
    before = [block.clone() for block in cache._blocks.values()]
    session.prefill(prompts[row])
    assert all(map(torch.equal, given, [features.hidden for features in earlier]))
    for old, new in zip(before, cache._blocks.values(), strict=True):
        changed = (old != new).any(0).any(-1).view(3, -1)
        assert changed.any(1).tolist() == [number == row for number in range(3)]
        assert not changed[row, graph_size(session, prompts[row]) :].any()
    assert cache.lengths.tolist() == [len(prompt) for prompt in prompts[: row + 1]] + [0] * (2 - row)


def graph_size(session, prompt):
    return session._graphs.bucket(len(prompt))


def test_prompts_that_are_too_long_or_come_in_pieces_are_launched_as_ever(recorded_prompts, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "MOST_ROWS", 32)
    engine = recorded_prompts("llava")
    longer = next(one for one in requests("llava") if len(one) > 32)
    assert engine.generate(longer, Sampling(max_new_tokens=4)).tokens
    assert engine._target._graphs.recorder.replays == 0
    pieces = engine._target.pieces(longer, 20)
    assert [None for _ in pieces]
    assert engine._target._graphs.recorder.replays == 1, "the first piece is as short as a prompt"


def test_prompts_are_recorded_also_where_steps_cannot_be(monkeypatch):
    """Else `none` pads and replays a prompt that `lookup` beside it launches: half precision rounds these apart."""
    let_prompts_be_recorded(monkeypatch)
    engine = Engine(target("llava"), LookupDrafter(), slots=2, capacity=CAPACITY)
    engine._recorded, told = True, []
    engine.warm_up(progress=lambda done, total: told.append((done, total)))
    recorder = engine._target._graphs.recorder
    assert told[-1] == (recorder.captures, recorder.captures)
    shortest = min(requests("llava"), key=len)
    assert engine.generate(shortest, Sampling(max_new_tokens=4)).tokens
    assert recorder.replays == 1
    assert engine._recorder.captures == engine._recorder.replays == 0


def test_an_engine_that_is_thrown_away_gives_its_cache_back_at_once(recorded_prompts):
    """By references alone: on a GPU that is the memory of the next engine, long before Python collects its garbage."""
    gc.disable()
    try:
        engine = recorded_prompts("llava")
        assert engine.generate(requests("llava")[0], Sampling(max_new_tokens=2)).tokens
        block = weakref.ref(next(iter(engine._target.cache._blocks.values())))
        del engine
        assert block() is None
    finally:
        gc.enable()


def test_no_garbage_is_collected_while_a_graph_is_recorded(monkeypatch):
    """Another graph may be in it, and one that ends within a recording spoils that."""
    collects = []
    monkeypatch.setattr(torch, "cuda", MagicMock())
    recorder = Recorder(lambda _: collects.append(gc.isenabled()), [torch.zeros(1)], Place(None, MagicMock()))
    recorder._record("key", [torch.zeros(1)])
    assert collects == [True] * WARM_UPS + [False]
    assert gc.isenabled()


def test_where_nothing_is_recorded_prompts_are_not():
    engine = engine_for("eaglevlm", "llava")
    assert engine._target.recordings(engine._recorder.place) == []


# Buckets and warm-up


@pytest.mark.parametrize("most", [1, 3, 8, 32])
def test_row_buckets_are_few_and_large_enough(most):
    buckets = {row_bucket(rows, most) for rows in range(1, most + 1)}
    assert len(buckets) <= most.bit_length() + 1
    assert all(rows <= row_bucket(rows, most) <= most for rows in range(1, most + 1))


@pytest.mark.parametrize("most", [100, 4096, 32768])
def test_column_buckets_are_few_and_close(most):
    buckets = {column_bucket(columns, most) for columns in range(1, most + 1)}
    assert len(buckets) <= 4 * most.bit_length()
    for columns in range(1, most + 1):
        spare = column_bucket(columns, most) - columns
        assert 0 <= spare < max(256, columns / 4)
        assert columns + spare <= most


def test_after_warming_up_nothing_is_recorded_any_more():
    engine = replaying("eaglevlm", "llava", slots=3)
    told = []
    engine.warm_up(samplings=[Sampling(), *MIXED[1:2]], progress=lambda done, total: told.append((done, total)))
    captures = engine._recorder.captures
    assert told[-1] == (captures, captures)
    assert [done for done, _ in told] == list(range(1, captures + 1))
    many = [Sampling(temperature=i % 2, seed=i, max_new_tokens=3 + 5 * i % 17) for i in range(9)]
    engine.generate_all((requests("llava") * 3)[:9], many)
    assert engine._recorder.captures == captures
    assert engine._recorder.replays > 20


def test_an_adaptive_plan_has_few_graphs_and_records_none_after_warming_up(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = Engine(target("llava"), guesser("eaglevlm", "llava"), slots=3, capacity=CAPACITY, shape="auto")
    engine._recorder = Replica(engine)
    engine.warm_up()
    captures = engine._recorder.captures
    assert captures == len(set(engine._buckets(WARM)))
    many = [Sampling(temperature=i % 2, seed=i, max_new_tokens=3 + 5 * i % 17) for i in range(9)]
    engine.generate_all((requests("llava") * 3)[:9], many)
    assert engine._recorder.captures == captures


@pytest.mark.parametrize(
    ("slots", "capacity", "most"), [(1, 1024, 28), (1, 4096, 84), (16, 1024, 128), (16, 4096, 384), (32, 4096, 432)]
)
def test_graphs_of_an_adaptive_plan_are_bounded(slots, capacity, most, monkeypatch):
    shapes = ladder(ROOMY)
    engine = Engine(target("llava"), None, shape=Planner(shapes, Costs(shapes)))
    monkeypatch.setattr(engine, "slots", slots)
    monkeypatch.setattr(engine, "capacity", capacity)
    buckets = engine._buckets(WARM)
    assert len(set(buckets)) == len(buckets) == most
    assert max(bucket.rows * bucket.shape.nodes for bucket in buckets) <= 256


def test_warming_up_changes_nothing():
    texts_before = texts(engine_for("eaglevlm", "qwen2_5_vl"), "qwen2_5_vl", "greedy")
    engine = replaying("eaglevlm", "qwen2_5_vl")
    engine.warm_up()
    assert texts(engine, "qwen2_5_vl", "greedy") == texts_before


def test_where_nothing_is_recorded_warming_up_does_nothing():
    engine = engine_for("eaglevlm", "llava", capture="off")
    engine.warm_up(progress=lambda *_: pytest.fail("nothing to do"))
    assert not engine._recorder.on


def test_a_recording_that_fails_is_told_once_and_costs_nothing(monkeypatch, caplog):
    family = "llava"
    eager = texts(engine_for("eaglevlm", family), family, "greedy")
    engine = replaying("eaglevlm", family)

    def fails(self, key, kept):
        Replica._record(self, key, kept)  # it has run before it failed
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(engine._recorder, "_record", fails.__get__(engine._recorder))
    assert texts(engine, family, "greedy") == eager
    (line,) = caplog.messages
    assert "operation not permitted" in line
    assert "\n" not in line
    assert engine._recorder.captures == engine._recorder.replays == 0
