"""The adaptive plan on machines of paper: what it chooses where cost and acceptance are known, and what it can lose."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from oracle import CAPACITY, DRAFTERS, Ask, assert_exact, compare, drafter, prompt, reference, target
from speculens.costs import TIMINGS, WORTH_KEEPING, Costs, Store, cache_folder, scale_of
from speculens.drafters import METHODS
from speculens.engine import Engine
from speculens.plan import CREDIT, INCOME, NO_DRAFT, PATIENCE, SAVINGS, Planner, Survival, expected, ladder
from speculens.sampling import Sampling
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from speculens.tree import TreeShape

OWN = TreeShape(num_steps=6, topk=10, num_draft_tokens=64)
SHAPES = ladder(OWN)
SMALLEST = TreeShape(num_steps=0, topk=1, num_draft_tokens=2)
SMALL = TreeShape(num_steps=2, topk=3, num_draft_tokens=9)


def on_cpu(shape: TreeShape, slots: int = 1) -> float:
    """Every node of every slot is work, and so is every level."""
    return 0.5 + 0.5 * slots * shape.nodes / 2 + 0.1 * shape.levels


def on_gpu(shape: TreeShape, slots: int = 1) -> float:
    """Nodes are free up to 256 in all; a level is a pass of the drafter."""
    return max(1.0, slots * shape.nodes / 256) + 0.04 * shape.levels


class World:
    """Steps of paper. `chain` is how likely one guess is right at a level; more nodes help as the plan's law says."""

    def __init__(self, cost, chain, *, slots=1, noise=0.0, seed=0):
        self.cost, self.chain, self.slots, self.noise = cost, chain, range(slots), noise
        self.random = random.Random(seed)
        self.plan = Planner(SHAPES, Costs(SHAPES))
        self.tokens = self.seconds = 0.0
        self.chosen = []

    def step(self):
        shape = self.plan.choose(self.slots, 300)
        accepted = {slot: self._follow(shape) for slot in self.slots}
        seconds = self.cost(shape, len(self.slots))
        self.plan.learn(accepted, seconds * self.random.uniform(1, 1 + self.noise))
        self.tokens += sum(accepted.values()) + len(self.slots)
        self.seconds += seconds
        self.chosen.append(shape)

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self.chosen[-steps:]

    @property
    def speed(self):
        """Against plain decoding on the same machine."""
        return self.tokens / len(self.slots) * self.cost(NO_DRAFT, len(self.slots)) / self.seconds

    def _follow(self, shape):
        nodes_a_level = (shape.nodes - 1) / max(shape.levels, 1)
        miss = (1 - self.chain) ** (1 + math.log10(nodes_a_level or 1))
        return next((level for level in range(shape.levels) if self.random.random() < miss), shape.levels)


TURNS = TIMINGS * len(SHAPES)


def usual(shapes):
    return max(set(shapes), key=shapes.count)


def test_every_shape_is_timed_first_in_turns():
    world = World(on_cpu, 0.6)
    assert world.run(TURNS) == list(SHAPES) * TIMINGS


def test_where_nodes_cost_trees_are_small_and_where_they_are_free_large():
    cpu, gpu = World(on_cpu, 0.75), World(on_gpu, 0.75)
    for world in (cpu, gpu):
        world.run(300)
    assert usual(cpu.chosen[-100:]).nodes <= 4
    assert usual(gpu.chosen[-100:]).nodes >= 32
    assert gpu.speed > 2.5


def test_trees_shrink_as_slots_grow():
    sizes = []
    for slots in (1, 8, 32):
        world = World(on_gpu, 0.7, slots=slots)
        sizes.append(usual(world.run(TURNS + 200)[-100:]).nodes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("cost", [on_cpu, on_gpu])
def test_without_acceptance_it_stops_drafting_and_loses_little(cost):
    world = World(cost, 0.0)
    world.run(TURNS)
    world.tokens = world.seconds = 0.0
    world.run(20)
    assert world.chosen[-12:].count(NO_DRAFT) >= 11
    world.run(600)
    assert world.seconds <= world.tokens * cost(NO_DRAFT) * (1 + INCOME) + CREDIT * cost(NO_DRAFT)
    assert world.speed > 0.97
    assert set(world.chosen[-300:]) > {NO_DRAFT}, "it goes on probing"


def dearer(shape):
    return 1.0 if shape == NO_DRAFT else 2.5


def cheaper(shape):
    return 1.0 if shape == NO_DRAFT else 0.4


def one_alone(shape):
    return 0.4 if shape.nodes == 16 else 1.0


def misled(cost, chain, wrong, seed):
    """A world whose table was measured wrongly."""
    world = World(cost, chain, noise=0.2, seed=seed)
    world.plan._costs._seconds[scale_of(1, 300)] = {shape: cost(shape) * wrong(shape) for shape in SHAPES}
    world.run(600)
    return world


@pytest.mark.parametrize("wrong", [dearer, cheaper, one_alone])
def test_costs_that_were_measured_wrongly_are_found_out(wrong):
    for cost, chain in itertools.product((on_cpu, on_gpu), (0.0, 0.75, 0.9)):
        best = max(1.0, *((1 + expected([1 - chain], shape)) * cost(NO_DRAFT) / cost(shape) for shape in SHAPES))
        speeds = sorted(misled(cost, chain, wrong, seed).speed for seed in range(5))
        assert speeds[2] > 0.8 * best, (cost.__name__, chain, best, speeds)


def test_what_a_process_has_corrected_goes_to_disk(tmp_path):
    store = Store({}, tmp_path)
    filled(store)
    costs = Costs(SHAPES, store)
    for _ in range(WORTH_KEEPING):
        costs.learn((0, 0), NO_DRAFT, 1.0)
        costs.learn((0, 0), SMALLEST, 4.0)
    kept = store.read(SHAPES)[0, 0]
    assert kept[SMALLEST] / kept[NO_DRAFT] == pytest.approx(4, rel=0.1)


def test_a_plain_step_is_timed_now_and_then_where_drafting_pays():
    world = World(on_gpu, 0.9)
    world.run(TURNS)
    plain = [index for index, shape in enumerate(world.run(2000)) if shape == NO_DRAFT]
    rests = [later - earlier for earlier, later in itertools.pairwise([-1, *plain])]
    assert rests[0] <= 2 * PATIENCE
    assert rests == sorted(rests)
    assert rests[-1] > 10 * PATIENCE


def test_bad_luck_is_not_for_ever():
    """A chain's second guess that failed a few times is looked at again, though the tree of one guess never has it."""
    survival = Survival(12, [0.2, 0.9], [12, 12])
    for _ in range(300):
        survival.learn(SMALLEST, 1)
    assert survival.misses[1] < 0.2


def test_it_comes_back_when_acceptance_returns():
    world = World(on_gpu, 0.0)
    world.run(400)
    world.chain = 0.8
    world.run(150)
    assert NO_DRAFT not in world.chosen[-50:]


def test_a_purse_that_others_filled_pays_no_long_loss():
    world = World(on_gpu, 0.8)
    world.run(300)
    world.chain, world.tokens, world.seconds = 0.0, 0.0, 0.0
    world.run(400)
    assert world.seconds <= world.tokens * on_gpu(NO_DRAFT) * (1 + INCOME) + SAVINGS * on_gpu(NO_DRAFT)


def on_two_cores(shape: TreeShape, _slots: int = 1) -> float:
    """As measured there: the first guess costs most of what four levels cost."""
    return {1: 1.0, 2: 1.7, 4: 1.95, 8: 2.0}.get(shape.nodes, 2.3 + 0.1 * (shape.nodes - 14))


def test_a_run_of_bad_luck_does_not_end_drafting():
    """Text goes well and badly by turns, so that some trees in a row fail: that once stopped drafting for an answer."""
    speeds = []
    for seed in range(9):
        world = World(on_two_cores, 0.9, noise=0.15, seed=seed)
        for _ in range(600):
            if world.random.random() < 0.15:
                world.chain = 1.4 - world.chain
            world.step()
        speeds.append(world.speed)
    assert sorted(speeds)[4] > 1.45, speeds


def test_each_slot_has_its_own_acceptance_and_forgets_it():
    plan = Planner(SHAPES, Costs(SHAPES))
    for _ in range(TURNS):
        plan.learn({"some": 0}, on_gpu(plan.choose(["some"], 300)))
    for _ in range(TURNS + 40):
        shape = plan.choose(["good", "bad"], 300)
        plan.learn({"good": shape.levels, "bad": 0}, on_gpu(shape, 2))
    assert plan.choose(["good"], 300).nodes > plan.choose(["bad"], 300).nodes
    plan.forget("bad")
    plan.forget("bad")


def test_close_to_the_best_pinned_shape_with_noisy_clocks():
    for cost, chain in itertools.product((on_cpu, on_gpu), (0.4, 0.7, 0.9)):
        best = max((1 + expected([1 - chain], shape)) * cost(NO_DRAFT) / cost(shape) for shape in SHAPES)
        world = World(cost, chain, noise=0.3)
        world.run(TURNS)
        world.tokens = world.seconds = 0.0
        world.run(600)
        assert world.speed > 0.85 * best, (cost.__name__, chain, best)


def test_a_slower_machine_is_no_shapes_fault():
    world = World(on_gpu, 0.8)
    before = usual(world.run(300)[-100:])
    world.cost = lambda shape, slots: 3 * on_gpu(shape, slots)
    assert usual(world.run(300)) == before


def test_the_ladder_fits_within_the_drafters_own_tree():
    assert ladder(SMALL) == (NO_DRAFT, TreeShape(0, 1, 2), TreeShape(2, 1, 4), SMALL)
    for shape in SHAPES:
        assert shape.nodes == shape.num_draft_tokens
        assert (shape.num_steps, shape.topk) <= (OWN.num_steps, OWN.topk)
    assert [shape.nodes for shape in SHAPES] == [1, 2, 4, 8, 16, 32, 64]


def test_many_slots_get_small_trees_whose_costs_alone_are_learnt(tmp_path):
    store = Store({}, tmp_path)
    plan = Planner(SHAPES, Costs(SHAPES, store))
    slots = range(16)
    chosen = set()
    for _ in range(TURNS):
        chosen.add(plan.choose(slots, 300))
        plan.learn(dict.fromkeys(slots, 0), 1.0)
    assert chosen == set(plan.open(16)) == {shape for shape in SHAPES if shape.nodes <= 16}
    assert store.read(SHAPES)[scale_of(16, 300)].keys() == chosen
    assert tuple(plan.open(1)) == SHAPES


def test_a_step_that_was_not_an_ordinary_one_is_no_cost():
    plan = Planner(SHAPES, Costs(SHAPES))
    for _ in range(TURNS):
        assert plan.choose([0], 300) == NO_DRAFT
        plan.learn({0: 0}, None)


# --- costs on disk


def filled(store=None):
    costs = Costs(SHAPES, store)
    for turn in range(TIMINGS):
        for shape in SHAPES:
            pause = 50 if (turn, shape) == (2, SHAPES[3]) else 1
            costs.learn((0, 0), shape, shape.nodes * (1000, 1, 3, 2)[turn] * pause)
    return costs


def test_neither_first_timings_nor_a_pause_nor_a_slow_round_are_kept_and_the_next_process_starts_there(tmp_path):
    store = Store({"device": "paper"}, tmp_path)
    filled(store)
    again = Costs(SHAPES, Store({"device": "paper"}, tmp_path))
    assert again.untimed((0, 0)) is None
    assert again.of((0, 0)) == pytest.approx({shape: shape.nodes for shape in SHAPES})
    assert again.untimed((1, 0)) == SHAPES[0]
    assert Costs(SHAPES, Store({"device": "other"}, tmp_path)).untimed((0, 0)) is not None
    assert Costs((NO_DRAFT, SMALL), Store({"device": "paper"}, tmp_path)).untimed((0, 0)) is not None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"seconds": 3}', '{"seconds": {"0,0": {"0/1/1": -1.0}}}', '{"seconds": {"x": {}}}', "\0"],
)
def test_a_broken_file_is_as_good_as_none_and_is_replaced(tmp_path, text):
    store = Store({}, tmp_path)
    store.path.parent.mkdir()
    store.path.write_text(text)
    filled(store)
    assert json.loads(store.path.read_text())["seconds"]["0,0"]["6/10/64"] == pytest.approx(64)
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name]


def test_a_folder_that_cannot_be_written_is_not_written(tmp_path):
    (tmp_path / "costs").write_text("in the way")
    filled(Store({}, tmp_path))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_args: object, **_options: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    filled(Store({}, tmp_path))
    assert not list((tmp_path / "costs").iterdir())


def test_the_users_cache_folder_is_respected(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "speculens"


def test_scales():
    assert [scale_of(slots, 1)[0] for slots in (1, 2, 3, 4, 5, 32)] == [0, 1, 2, 2, 3, 5]
    assert [scale_of(1, columns)[1] for columns in (0, 1024, 1025, 4096, 4097, 16384, 16385)] == [0, 0, 1, 1, 2, 2, 3]


# --- in the engine: any sequence of shapes is exact


class Whim:
    """An adversary: any shape at any time."""

    shapes = (*ladder(SMALL)[:-1], TreeShape(1, 3, 6), SMALL)

    def __init__(self, seed=0):
        self._random = random.Random(seed)
        self.used, self._left = [], 0

    def choose(self, slots, columns):
        if not self._left:  # runs of one shape, so that observing is also put off to its limit
            self._left, self._shape = self._random.randint(1, 6), self._random.choice(self.shapes)
        self._left -= 1
        self.used.append(self._shape)
        return self._shape

    def learn(self, accepted, seconds): ...

    def forget(self, slot): ...


ASKS = [Ask(), Ask(images=2, seed=1), Ask(images=0, seed=3)]
LONG = [Sampling(max_new_tokens=length) for length in (22, 12, 18)]


def made(name, asks=ASKS, samplings=LONG):
    if name not in METHODS:
        return drafter(name, "llava", asks, samplings)
    torch.manual_seed(0)
    guesser = make_drafter(DrafterRecipe(name, intermediate_size=96, tree=SMALL), target("llava")).to(torch.float64)
    for weight in guesser.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return guesser.eval().requires_grad_(False)


ALL = sorted({*DRAFTERS, *METHODS} - {"none", "eagle"})


def decode(guesser, plan, samplings):
    engine = Engine(target("llava"), guesser, slots=2, capacity=CAPACITY, shape=plan)
    return engine.generate_all([prompt("llava", ask) for ask in ASKS], samplings)


@pytest.mark.parametrize("name", ALL)
def test_greedy_text_is_the_targets_own_under_any_sequence_of_shapes(name):
    plan = Whim(len(name))
    for ask, sampling, got in zip(ASKS, LONG, decode(made(name), plan, LONG), strict=True):
        compare(got.tokens, reference("llava", ask, sampling), f"{name}, {ask}")
    assert NO_DRAFT in plan.used
    assert len(set(plan.used)) > 2


@pytest.mark.parametrize("name", ALL)
def test_sampled_text_is_the_same_under_any_sequence_of_shapes(name):
    samplings = [
        Sampling(max_new_tokens=18, temperature=temperature, top_p=top_p, repetition_penalty=penalty, seed=seed)
        for seed, (temperature, top_p, penalty) in enumerate([(1.0, 1.0, 1.0), (0.7, 0.9, 1.0), (1.3, 1.0, 1.1)] * 2)
    ][: len(ASKS)]
    plain = [got.tokens for got in decode(None, None, samplings)]
    assert [got.tokens for got in decode(made(name), Whim(len(name)), samplings)] == plain


class Script(Whim):
    """These shapes, one after another."""

    def __init__(self, shapes):
        self.shapes, self._script = (NO_DRAFT, SMALL), iter(shapes)

    def choose(self, slots, columns):
        return next(self._script)


@pytest.mark.parametrize("plain", [1, 2, 5, 9])
def test_what_is_observed_late_is_observed_all_the_same(plain):
    """After steps without a draft, the next tree is that of a drafter that saw each of them at once."""

    def tree(rests):
        engine = Engine(target("llava"), made("eaglevlm"), capacity=CAPACITY, shape=Script([*rests, SMALL]))
        return list(engine.stream(prompt("llava", Ask()), Sampling(max_new_tokens=2 + plain)))[-1].tree

    never = replace(NO_DRAFT, num_draft_tokens=2)  # its only guess is always wrong with these weights
    late, at_once = tree([NO_DRAFT] * plain), tree([never] * plain)
    assert torch.equal(late.tokens, at_once.tokens)
    assert torch.equal(late.parents, at_once.parents)


def test_a_slot_is_forgotten_however_it_ends():
    """Slots hold prompts with their pictures: a plan that kept one of a client that left would keep them for ever."""
    engine = Engine(target("llava"), made("eaglevlm"), slots=2, capacity=CAPACITY, shape="auto")
    ends, leaves = (engine.admit(prompt("llava", ask), Sampling(max_new_tokens=4)).slot for ask in ASKS[:2])
    engine.step()
    assert set(engine._plan._slots) == {ends, leaves}
    engine.cancel(leaves)
    assert set(engine._plan._slots) == {ends}
    while engine.running:
        engine.step()
    assert not engine._plan._slots


def test_auto_is_exact_keeps_its_costs_and_plans_only_where_trees_grow(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    long = [Sampling(max_new_tokens=40)] * len(ASKS)
    for ask, sampling, got in zip(ASKS, long, decode(made("eaglevlm"), "auto", long), strict=True):
        compare(got.tokens, reference("llava", ask, sampling))
    assert list((tmp_path / "speculens" / "costs").glob("*.json"))
    assert_exact("llava", made("oracle"), ASKS, LONG)
    compare(decode(None, "auto", LONG)[0].tokens, reference("llava", ASKS[0], LONG[0]))
