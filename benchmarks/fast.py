r"""The whole table of speed at a 7B's cost, with real acceptance, in one run on one GPU.

    python -m benchmarks.fast --target testbed/weights/qwen2_5_vl --drafters testbed/weights/qwen2_5_vl-eaglevlm \
        --out runs/fast --minutes 9
    python -m benchmarks.fast --target testbed/weights/llava --drafters testbed/weights/llava-eaglevlm --tiny

The target is a trained testbed model, widened to Qwen2.5-VL-7B's or LLaVA-1.5-7B's decoder (`benchmarks.widen`). Parts:

    step    milliseconds of a step: plain, scoring a fixed tree of 60 nodes, drafting and scoring one; the host's share
    profile kernels of a step by name and the gaps between them, replayed and one by one
    pairs   every prompt by `none` and by each drafter in turn, at T = 0 and T = 1: speedup, acceptance, exactness;
            each drafter with the better of the adaptive ladder's two largest trees (`plan.py`), pinned, which prompts
            of their own choose
    hf      the same prompts by Hugging Face's `generate`: eager, with prompt lookup, with a static cache and compiled
    slots   tokens per second of 1, 4, 16 and 32 slots, speculation off and on, again with the better of the two
            largest trees that so many slots may have; a first run chooses it
    queue   three requests a slot, 16 slots: whoever ends makes room for the next between two steps; tokens per second
            of all, prompts included, and how long those that run wait for a step
    memory  peak over `none`; bytes of KV as the engine tells them, and as they were allocated

Graphs are recorded before anything is timed, and trees are pinned. Each part writes its JSON when it ends,
a failed one its error; at `--minutes` the run ends with what it has.

The prefix. The testbed's targets learned one picture a prompt, 280 rows. Four pictures (1,055 rows) before the question
keep Qwen2.5-VL's answers in their grammar, at about 80 % of the acceptance length, though it reads the wrong picture;
LLaVA's fall apart beyond one picture, and both do after earlier turns. So `step`, which needs no sense, has
`--long-pictures` pictures, and the other parts have `--pictures`. The last line is JSON.

A reduced draft vocabulary. With `--draft-vocab N` drafters draft N tokens alone, as after `speculens trim`: that takes
the commonest of the answers and fills up with the lowest ids. All 2,048 tokens of the testbed are among the lowest, so
what is drafted stays complete and acceptance as it was: only the cost is real here. On real data a reduced vocabulary
misses tokens (EAGLE-3 drafts 32k, FR-Spec 32k of 128k).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks import memory
from benchmarks.prompts import HELDOUT, questions, with_pictures
from benchmarks.widen import SEVEN_B, widen_drafter, widen_target
from speculens import Engine, NoDrafter, Sampling, TreeShape, load_drafter, load_target
from speculens.answer import Answer, Entry, ask
from speculens.bench import peers
from speculens.costs import scale_of, within
from speculens.drafters import Drafter, TrainedDrafter
from speculens.errors import UserError
from speculens.plan import ROOMY, ladder
from speculens.stats import Stats
from speculens.targets import Prompt, Target
from speculens.tree import DraftTree

NONE = "none"
TEMPERATURES = {"t0": 0.0, "t1": 1.0}
SLOTS = (16, 1, 4, 32)  # the one that must be met first, should time run out
IDLE_US = 5.0  # within a graph a kernel follows the last one sooner: where the GPU rests longer, it waits for the host
# The project's goals: (must, aim), and whether more is better.
GOALS = {
    "autoregressive_ms": (5.4, 4.5, False),
    "score_60_over_autoregressive": (1.25, 1.1, False),
    "step_over_autoregressive": (1.6, 1.35, False),
    "efficiency_t0": (0.62, 0.75, True),
    "best_ms_a_token_t0": (2.1, 1.4, False),
    "speedup_t0": (2.4, 3.2, True),
    "speedup_t1": (2.0, 2.6, True),
    "speedup_over_hf_eager": (9.0, 15.0, True),
    "throughput_16_slots": (1.2, 1.6, True),
    "host_share": (0.10, 0.0, False),
    "memory_over_none": (1.10, 1.05, False),
    "kv_promised_over_measured": (1.02, 1.0, False),
}


class OutOfTimeError(TimeoutError):
    """The budget is spent: whatever is complete by now is the result."""


class Clock:
    """A budget of minutes from now."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def check(self, *_: Any) -> None:
        """Raise OutOfTimeError if nothing is left. Takes whatever a progress callback is given."""
        if self.left < 0:
            raise OutOfTimeError("no time left")


@dataclass(frozen=True)
class Setup:
    """What all parts share.

    drafters  by name, without `none`; the first one is the one that `step` and `slots` look at
    prompts   of the parts that need natural answers
    trial     others, by which trees are chosen
    long      one prompt with a long prefix
    """

    small: Target
    target: Target
    drafters: Mapping[str, Drafter]
    prompts: Sequence[Prompt]
    trial: Sequence[Prompt]
    long: Prompt
    new_tokens: int
    shape: TreeShape
    clock: Clock
    compile_seconds: float
    rounds: int = 5
    slots: Sequence[int] = SLOTS

    def engine(
        self,
        name: str,
        prompts: Sequence[Prompt],
        samplings: Sequence[Sampling],
        slots: int = 1,
        shape: TreeShape | None = None,
        **options: Any,
    ) -> Engine:
        """With room for these prompts and their answers, and its graphs recorded for these settings."""
        drafter = NoDrafter() if name == NONE else self.drafters[name]
        capacity = max(map(len, prompts)) + self.new_tokens
        engine = Engine(self.target, drafter, slots=slots, capacity=capacity, shape=shape or self.shape, **options)
        engine.warm_up(samplings, self.clock.check)
        return engine

    @property
    def best(self) -> str:
        return next(iter(self.drafters))


# Steps


class FixedTree:
    """Drafts the same tree always, at no cost: what is left of a step is the target's. Lines of tokens side by side."""

    name = "fixed"

    def __init__(self, nodes: int, lines: int = 10) -> None:
        self.nodes, self._lines = nodes, lines

    def session(self, target: Target, *_: Any, **__: Any) -> _FixedSession:
        node = torch.arange(self.nodes, device=target.device)
        depth = (node + self._lines - 1) // self._lines
        parents = (node - self._lines).clamp(min=0)
        live = torch.ones_like(node, dtype=torch.bool)
        levels = (self.nodes + self._lines - 2) // self._lines
        parts = (part[None] for part in (node + 100, parents, depth, live))
        return _FixedSession(DraftTree.build(*parts, levels), self.nodes)


@dataclass
class _FixedSession:
    tree: DraftTree
    nodes: int
    state: Sequence[Tensor] = ()

    def draft(self, roots: Tensor, *_: Any, **__: Any) -> DraftTree:
        tree = self.tree.rows(torch.zeros_like(roots))
        return dataclasses.replace(tree, tokens=torch.cat([roots[:, None], tree.tokens[:, 1:]], 1))

    def begin(self, *_: Any) -> None: ...

    def observe(self, *_: Any) -> None: ...

    def settle(self, *_: Any) -> None: ...

    def free(self, *_: Any) -> None: ...


def measure_steps(setup: Setup) -> dict[str, Any]:
    """Medians over rounds in turn. A step ends where the host knows its tokens: its time is that between two ends.

    A drafter's share of its step is what remains when scoring the same tree without drafting it is taken away.
    """
    tree, sampling = setup.shape.num_draft_tokens, _long_sampling(setup)
    fixed = dataclasses.replace(setup, drafters={"fixed": FixedTree(tree)})
    engines = {"plain": setup.engine(NONE, [setup.long], [sampling])}
    engines["score"] = fixed.engine("fixed", [setup.long], [sampling])
    engines |= {name: setup.engine(name, [setup.long], [sampling]) for name in setup.drafters}
    measure = partial(_step_ms, prompt=setup.long, sampling=sampling, clock=setup.clock)
    rounds = _rounds({name: partial(measure, engine) for name, engine in engines.items()}, setup.rounds)
    plain, score = rounds["plain"], statistics.median(rounds["score"])
    result: dict[str, Any] = {"rows": len(setup.long), "nodes": tree, "rounds": len(plain)}
    for name, times in rounds.items():
        ratios = [one / other for one, other in zip(times, plain, strict=True)]
        result[name] = {"ms": statistics.median(times), "over_plain": statistics.median(ratios), "all_ms": times}
        result[name]["replays"] = engines[name].replays
    for name in setup.drafters:
        result[name]["draft_time_fraction"] = 1 - score / result[name]["ms"]
    for name in ("plain", setup.best):
        profile = _profile(engines[name], setup.long, sampling, most=8)
        result[name] |= profile | undisturbed(profile, result[name]["ms"])
    return result


def _long_sampling(setup: Setup) -> Sampling:
    return Sampling(max_new_tokens=setup.new_tokens, ignore_eos=True)


def _rounds(contenders: Mapping[str, Callable[[], Any]], count: int) -> dict[str, list[Any]]:
    """What everybody measures in each of `count` rounds, the order turning round; after one more, unmeasured.

    Rounds that time ran out in are not in it; if that was the first, raises OutOfTimeError.
    """
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    try:
        for number in range(count):
            order = list(contenders) if number % 2 else list(reversed(contenders))
            found = {name: contenders[name]() for name in order}
            for name, values in results.items():
                values.append(found[name])
    except OutOfTimeError:
        if not all(results.values()):
            raise
    return results


def _step_ms(engine: Engine, prompt: Prompt, sampling: Sampling, clock: Clock) -> float:
    """Median of all steps but the first."""
    ends = []
    for _ in engine.stream(prompt, sampling):
        ends.append(time.perf_counter())
        clock.check()
    return 1e3 * statistics.median(after - before for before, after in pairwise(ends[1:]))


# Profiles


def measure_profiles(setup: Setup) -> dict[str, Any]:
    """A plain step and a drafted one: replayed as they are measured, and one kernel after the other."""
    result: dict[str, Any] = {}
    sampling = _long_sampling(setup)
    for name in (NONE, setup.best):
        for way, capture in (("replayed", "auto"), ("eager", "off")):
            engine = setup.engine(name, [setup.long], [sampling], capture=capture)
            result[f"{name}, {way}"] = _profile(engine, setup.long, sampling, most=40)
    return result


def _profile(engine: Engine, prompt: Prompt, sampling: Sampling, most: int, steps: int = 10) -> dict[str, Any]:
    """Of one step in milliseconds: each kernel's time, and the rests between kernels. Nothing on a CPU.

    host_share  of the time from the first kernel to the last one, in which the GPU rests for more than IDLE_US; the
                profiler slows the host down, so that is more than without it
    """
    if engine.target.device.type != "cuda":
        return {}
    running = engine.stream(prompt, sampling)
    list(islice(running, 4))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        count = len(list(islice(running, steps)))
        torch.cuda.synchronize()
    running.close()
    device = torch.autograd.DeviceType.CUDA
    return kernels_and_rests(
        [(e.name, e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type == device],
        count,
        most,
    )


def undisturbed(profile: Mapping[str, Any], ms: float) -> dict[str, float]:
    """The host's share of a step that took so long without the profiler, in which the device does the same work."""
    busy = profile.get("kernels_ms", 0.0) + profile.get("short_rests_ms", 0.0)
    return {"host_share_undisturbed": max(0.0, 1 - busy / ms)} if busy else {}


def kernels_and_rests(kernels: Sequence[tuple[str, float, float]], steps: int, most: int) -> dict[str, Any]:
    """Figures of one of so many steps, from all kernels (name, begin, end) in us; the `most` longest names."""
    if not kernels:
        return {"kernels": 0}
    spent: dict[str, list[float]] = {}
    rests, last = [], min(begin for _, begin, _ in kernels)
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        spent.setdefault(name[:100], []).append(end - begin)
        rests.append(max(0.0, begin - last))
        last = max(last, end)
    span = last - min(begin for _, begin, _ in kernels)
    waits = sum(rest for rest in rests if rest > IDLE_US)
    longest = sorted(spent, key=lambda name: -sum(spent[name]))[:most]
    unit = 1e3 * steps
    return {
        "kernels": len(kernels) / steps,
        "profiled_ms": span / unit,
        "kernels_ms": (span - sum(rests)) / unit,
        "short_rests_ms": (sum(rests) - waits) / unit,
        "host_ms": waits / unit,
        "host_share": waits / span if span else 0.0,
        "by_name": {name: {"ms": sum(spent[name]) / unit, "count": len(spent[name]) / steps} for name in longest},
    }


# Pairs


def measure_pairs(setup: Setup) -> dict[str, Any]:
    """Speedups over `none`, at as many temperatures as there is time for; trees are chosen at the first one."""
    result: dict[str, Any] = {}
    samplings = {
        name: Sampling(temperature=temperature, max_new_tokens=setup.new_tokens)
        for name, temperature in TEMPERATURES.items()
    }
    settings = list(samplings.values())
    trees = {name: _fastest(setup, name, settings) for name in setup.drafters}
    engines = {NONE: setup.engine(NONE, setup.prompts, settings)}
    engines |= {name: tree.engine for name, tree in trees.items()}
    for name, sampling in samplings.items():
        try:
            answers = _in_turn({who: partial(ask, engine) for who, engine in engines.items()}, setup, sampling)
        except OutOfTimeError:
            if not result:
                raise
            break
        result[name] = {who: _compared(who, answers) | (trees[who].words if who in trees else {}) for who in engines}
        if not sampling.temperature:
            result |= _beside_the_small(setup, answers[NONE], sampling)
    return result


def _beside_the_small(setup: Setup, answers: Sequence[Answer], sampling: Sampling) -> dict[str, Any]:
    """Whether the wide target says what the small one says, which bfloat16 may spoil."""
    small = Engine(setup.small, capacity=max(map(len, setup.prompts)) + setup.new_tokens)
    own = [ask(small, prompt, sampling) for prompt in setup.prompts[: len(answers)]]
    wide = Entry("wide", answers, own)
    return {
        "like_the_small_model": {"prompts": len(own), "equal": wide.num_exact, "at": wide.differences},
        "text": [answer.generation.text[:120] for answer in answers[:4]],
    }


def _in_turn(
    contenders: Mapping[str, Callable[[Prompt, Sampling], Answer]], setup: Setup, sampling: Sampling
) -> dict[str, list[Answer]]:
    """Every prompt by everybody; the first prompt once more before, unmeasured."""

    def ask_next(answer: Callable[[Prompt, Sampling], Answer], prompts: Iterator[Prompt]) -> Answer:
        setup.clock.check()
        return answer(next(prompts), sampling)

    asked = [setup.prompts[0], *setup.prompts]
    turns = {name: partial(ask_next, answer, iter(asked)) for name, answer in contenders.items()}
    return _rounds(turns, len(setup.prompts))


def _compared(name: str, answers: Mapping[str, Sequence[Answer]], base: str = NONE) -> dict[str, Any]:
    entry = Entry(name, answers[name], answers[base])
    ratios = [own.seconds / mine.seconds for mine, own in zip(entry.answers, entry.own, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    decoding = sum(answer.decode_seconds for answer in entry.answers)
    length = entry.stats.mean_acceptance_length
    return entry.to_dict() | {
        "median_speedup": median,
        "quartiles": [low, high],
        "efficiency": entry.walltime_speedup / length if length else None,
        "ms_a_token": 1e3 * decoding / max(1, entry.tokens - len(ratios)),
        "time_to_first_token_ms": 1e3 * statistics.median(answer.time_to_first_token for answer in entry.answers),
    }


# Hugging Face


def measure_huggingface(setup: Setup) -> dict[str, Any]:
    """`generate` on the same model with its own attention, beside our `none` and our first drafter."""
    sampling = Sampling(max_new_tokens=setup.new_tokens)
    theirs = {
        name: partial(_own, setup.target, peers.load_peer(name, setup.target, temperature=0).answer)
        for name in ("hf", "hf:lookup")
    }
    none, tree = setup.engine(NONE, setup.prompts, [sampling]), _fastest(setup, setup.best, [sampling])
    ours = {NONE: partial(ask, none), setup.best: partial(ask, tree.engine)}
    few = dataclasses.replace(setup, prompts=setup.prompts[:6])
    answers = _in_turn({**ours, **theirs}, few, sampling)
    result = {name: _compared(name, answers, base="hf") for name in answers}
    return result | {"hf static, compiled": _static(setup, sampling, answers[NONE][0])}


@contextmanager
def _own_attention(target: Target) -> Iterator[None]:
    """Hugging Face's loop with Hugging Face's attention."""
    before = target.decoder.config._attn_implementation  # noqa: SLF001 - there is no public name for it
    target.decoder.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        target.decoder.set_attn_implementation(before)


def _own(target: Target, answer: Callable[[Prompt, Sampling], Answer], prompt: Prompt, sampling: Sampling) -> Answer:
    with _own_attention(target):
        return answer(prompt, sampling)


def _static(setup: Setup, sampling: Sampling, own: Answer) -> dict[str, Any]:
    """One prompt thrice, compiled at the first: a static cache of another length would be compiled anew."""
    generate = partial(peers.generate, setup.target, {"cache_implementation": "static"})
    answer = partial(_own, setup.target, generate, setup.prompts[0], sampling)
    begun = time.monotonic()
    try:
        with _alarm(min(setup.compile_seconds, setup.clock.left)):
            for _ in range(2):
                answer()
            compiling = time.monotonic() - begun
            answers = [answer() for _ in range(3)]
    except Exception as error:  # noqa: BLE001 - a baseline that cannot run is told, and the others stand
        return {"skipped": _line(error)}
    seconds = statistics.median(answer.seconds for answer in answers)
    same = answers[0].generation.tokens == own.generation.tokens
    return {"seconds": seconds, "none_over_it": own.seconds / seconds, "compile_seconds": compiling, "same": same}


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} seconds")

    if seconds <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Slots


def measure_slots(setup: Setup) -> dict[str, Any]:
    """All slots are filled, then decode to their ends; on and off in turn. Numbers of slots, as far as time allows."""
    result: dict[str, Any] = {}
    with suppress(OutOfTimeError):
        for slots in setup.slots:
            result[str(slots)] = _at_once(setup, slots)
    return result


def _at_once(setup: Setup, slots: int) -> dict[str, Any]:
    """The better of two trees beside no draft."""
    sampling, asked = Sampling(max_new_tokens=setup.new_tokens), list(islice(cycle(setup.prompts), slots))
    fill = partial(_fill, prompts=asked, sampling=sampling, clock=setup.clock)
    tree = _fastest(setup, setup.best, [sampling], slots, [asked])
    contenders = {NONE: setup.engine(NONE, asked, [sampling], slots), "drafted": tree.engine}
    runs = _rounds({name: partial(fill, engine) for name, engine in contenders.items()}, 2)
    figures = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in runs.items()}
    off, drafted = figures[NONE], figures["drafted"]
    return {
        **tree.words,
        "on_over_off": drafted[0] / off[0],
        "on_over_off_with_prefill": drafted[1] / off[1],
        "mean_acceptance_length": drafted[2],
        "mean_draft_tokens": drafted[3],
        "tokens_per_second": {name: row[0] for name, row in figures.items()},
        "with_prefill": {name: row[1] for name, row in figures.items()},
    }


# A queue


def measure_queue(setup: Setup, slots: int = 16, each: int = 3) -> dict[str, Any]:
    """Prompts are filled in while others run. On and off in turn, with the better of two trees."""
    sampling = Sampling(max_new_tokens=setup.new_tokens)
    asked = list(islice(cycle(setup.prompts), each * slots))
    tree = _fastest(setup, setup.best, [sampling], slots, [asked[:slots]])
    contenders = {NONE: setup.engine(NONE, asked, [sampling], slots), "drafted": tree.engine}
    serve = partial(_serve, asked=asked, sampling=sampling, clock=setup.clock)
    runs = _rounds({name: partial(serve, engine) for name, engine in contenders.items()}, 2)
    speeds = {name: statistics.median(speed for speed, _ in found) for name, found in runs.items()}
    waits = {name: statistics.quantiles(chain(*(ms for _, ms in found)), n=20) for name, found in runs.items()}
    return {
        "slots": slots,
        "requests": len(asked),
        **tree.words,
        "tokens_per_second": speeds,
        "on_over_off": speeds["drafted"] / speeds[NONE],
        "step_ms": {name: {"median": cuts[9], "of_20_the_longest": cuts[18]} for name, cuts in waits.items()},
    }


def _serve(engine: Engine, asked: Sequence[Prompt], sampling: Sampling, clock: Clock) -> tuple[float, list[float]]:
    """Tokens per second from the first request to the last token, and the milliseconds between ends of steps."""
    begun = time.perf_counter()
    served = [engine.submit(prompt, sampling) for prompt in asked]
    ends = [begun]
    while engine.running or engine.pending:
        engine.step()
        ends.append(time.perf_counter())
        clock.check()
    tokens = sum(len(slot.tokens) for slot in served)
    return tokens / (ends[-1] - begun), [1e3 * (after - before) for before, after in pairwise(ends)]


@dataclass(frozen=True)
class _Tree:
    """An engine with the tree that was the fastest of those tried; tokens per second of each."""

    engine: Engine
    tried: Mapping[str, float]

    @property
    def words(self) -> dict[str, Any]:
        """For a JSON."""
        return {"tree": max(self.tried, key=lambda name: self.tried[name]), "tried": self.tried}


def _fastest(
    setup: Setup,
    name: str,
    samplings: Sequence[Sampling],
    slots: int = 1,
    asked: Sequence[Sequence[Prompt]] | None = None,
) -> _Tree:
    """The largest trees of so many slots, tried in the first setting by prompts that are asked at once.

    asked  by default those for trial, one by one
    """
    asked = asked or [[prompt] for prompt in setup.trial]
    capacity = [*setup.prompts, *setup.trial]
    engines = {_words(shape): setup.engine(name, capacity, samplings, slots, shape) for shape in _shapes(slots)}
    tried = {
        words: statistics.mean(_fill(engine, prompts, samplings[0], setup.clock)[0] for prompts in asked)
        for words, engine in engines.items()
    }
    return _Tree(engines[max(tried, key=lambda words: tried[words])], tried)


def _shapes(slots: int, most: int = 2) -> list[TreeShape]:
    """The largest trees that an adaptive plan could give so many slots at once."""
    return list(within(ladder(ROOMY), scale_of(slots, 1))[-most:])


def _words(shape: TreeShape) -> str:
    return f"{shape.num_steps}/{shape.topk}/{shape.num_draft_tokens}"


def _fill(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, clock: Clock
) -> tuple[float, float, float, float]:
    """Tokens per second of decoding, the same with prefill; tokens and drafted nodes of one slot's pass."""
    begun = time.perf_counter()
    running = [engine.admit(prompt, sampling).slot for prompt in prompts]
    _wait(engine.target.device)
    filled = time.perf_counter()
    while engine.running:
        engine.step()
        clock.check()
    done = time.perf_counter()
    tokens = sum(len(slot.tokens) for slot in running)
    stats = Stats.total(slot.stats for slot in running)
    decoded = tokens - len(running)
    drafted = stats.num_draft_tokens / max(1, stats.num_drafts)
    return decoded / (done - filled), tokens / (done - begun), stats.mean_acceptance_length, drafted


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Memory


def measure_memory(setup: Setup) -> dict[str, Any]:
    """Peak with one drafter's weights, trees and caches over that of `none`, all other drafters left out."""
    target, names = setup.target, (NONE, *setup.drafters)
    kv = {name: _kv_bytes(setup, name) for name in names}
    peaks = {name: _peak(setup, name) for name in names}
    plain = peaks[NONE]
    return {
        "kv_bytes": kv,
        "target_bytes": sum(p.nbytes for p in target.model.parameters()),
        "peak_bytes": peaks,
        "over_none": {name: most / plain if most and plain else None for name, most in peaks.items()},
    }


def _kv_bytes(setup: Setup, name: str) -> dict[str, int]:
    """What an engine says that it holds, and what making it allocates: the small buffers of its steps, too.

    Not the head that a reduced vocabulary, or a drafter in 8 bits, copies: these are weights.
    """
    device = setup.target.device
    memory.free(device)
    before = memory.allocated(device)
    drafter = NoDrafter() if name == NONE else setup.drafters[name]
    engine = Engine(setup.target, drafter, capacity=len(setup.long) + setup.new_tokens, shape=setup.shape)
    weights = memory.weights(getattr(engine._drafter, "_head", None))  # noqa: SLF001 - nobody else asks
    taken = memory.allocated(device) - before
    return {"promised": sum(engine.kv_bytes.values()), "measured": taken - weights if taken else 0}


def _peak(setup: Setup, name: str) -> int | None:
    """Bytes in use at most, with graphs; the buffers of those that lie in their pool count as long as they do."""
    sampling = Sampling(max_new_tokens=setup.new_tokens)
    others = [drafter for other, drafter in setup.drafters.items() if other != name]
    return memory.peak(
        setup.target.device,
        others,
        lambda: ask(setup.engine(name, [setup.long], [sampling]), setup.long, sampling),
    )


# The run

PARTS: Mapping[str, Callable[[Setup], dict[str, Any]]] = {
    "step": measure_steps,
    "profile": measure_profiles,
    "pairs": measure_pairs,
    "hf": measure_huggingface,
    "slots": measure_slots,
    "queue": measure_queue,
    "memory": measure_memory,
}


def main() -> None:
    """The command line."""
    given = _arguments().parse_args()
    clock = Clock(given.minutes)
    setup = _prepare(given, clock)
    print(f"ready after {60 * given.minutes - clock.left:.0f} s: {len(setup.prompts)} prompts", flush=True)
    results: dict[str, Any] = {"setting": _setting(given, setup)}
    for name in given.parts.split(","):
        results[name] = _run(PARTS[name], setup)
        memory.free(setup.target.device)
        print(f"{name}: {clock.left:.0f} s left {results[name].get('error', '')}", flush=True)
        if given.out:
            given.out.mkdir(parents=True, exist_ok=True)
            (given.out / f"{name}.json").write_text(json.dumps(results["setting"] | results[name], indent=1) + "\n")
    _print_table(results)
    print(json.dumps(results))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="a testbed target, which is widened")
    parser.add_argument("--drafters", nargs="+", required=True, help="its drafters; steps and slots take the first")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--prompts", type=int, default=16, help="held-out questions")
    parser.add_argument("--pictures", type=int, default=1, help="pictures before each question, its own the last")
    parser.add_argument("--long-pictures", type=int, default=4, help="the same for the steps")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="at most: answers end where they end")
    parser.add_argument("--draft-vocab", type=int, metavar="N", help="tokens that drafters draft (default: all)")
    parser.add_argument("--int8", action="store_true", help="drafters hold their matrices in 8 bits")
    parser.add_argument("--tree", type=int, nargs=3, default=(5, 10, 60), metavar=("STEPS", "TOPK", "NODES"))
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run, widening included")
    parser.add_argument("--compile-minutes", type=float, default=1.25, help="of Hugging Face's static cache, compiled")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU: few tokens, nothing widened")
    parser.add_argument("--out", type=Path, help="folder for each part's JSON")
    return parser


def _prepare(given: argparse.Namespace, clock: Clock) -> Setup:
    device, dtype = ("cpu", torch.float32) if given.tiny else ("cuda", torch.bfloat16)
    small = load_target(given.target, device=device, dtype=dtype)
    drafters = {Path(name).name: load_drafter(name, dtype=dtype, device=device, int8=False) for name in given.drafters}
    target = small
    if not given.tiny:
        target = widen_target(small, SEVEN_B[small.family], device=device, dtype=dtype)
        drafters = {name: widen_drafter(drafter, target) for name, drafter in drafters.items()}
    if given.draft_vocab:
        drafters = {name: _trimmed(drafter, small, given.draft_vocab) for name, drafter in drafters.items()}
    if given.int8:
        for drafter in drafters.values():
            if isinstance(drafter, TrainedDrafter):
                drafter.press()
    count, trial = (2, 1) if given.tiny else (given.prompts, 3)
    asked = questions([HELDOUT / "charts.jsonl"], count + trial)
    encoded = [target.encode(question) for question in with_pictures(asked, given.pictures)]
    return Setup(
        small=small,
        target=target,
        drafters=drafters,
        prompts=encoded[:count],
        trial=encoded[count:],
        long=target.encode(with_pictures(asked, given.long_pictures)[0]),
        new_tokens=12 if given.tiny else given.max_new_tokens,
        shape=TreeShape(*given.tree),
        clock=clock,
        compile_seconds=60 * given.compile_minutes,
        **({"rounds": 1, "slots": (1, 4)} if given.tiny else {}),
    )


def _trimmed(drafter: Drafter, small: Target, size: int) -> Drafter:
    """Drafts the lowest ids alone: what `speculens trim` would choose, too, where they cover all that is ever said."""
    if not isinstance(drafter, TrainedDrafter):
        return drafter
    if not small.vocab_size <= size <= drafter.config.target_vocab_size:
        raise UserError(
            f"--draft-vocab {size} is impossible: the tokens that are said are {small.vocab_size}, and the vocabulary "
            f"has {drafter.config.target_vocab_size}."
        )
    return drafter.trimmed(torch.arange(size, device=drafter.fc.weight.device)).eval().requires_grad_(False)


def _run(part: Callable[[Setup], dict[str, Any]], setup: Setup) -> dict[str, Any]:
    """A part that fails must not take the others with it: device time is dear."""
    begun = time.monotonic()
    try:
        setup.clock.check()
        return part(setup) | {"part_seconds": time.monotonic() - begun}
    except OutOfTimeError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - told, with its place
        traceback.print_exc()
        return {"error": _line(error)}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".split("\n", maxsplit=1)[0]


def _setting(given: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    on_gpu = setup.target.device.type == "cuda"
    return {
        "target": Path(given.target).name,
        "drafters": list(setup.drafters),
        "layers": setup.target.num_layers,
        "hidden": setup.target.hidden_size,
        "fused": setup.target.fused() is not None,
        "vocabulary": setup.target.vocab_size,
        "draft_vocabulary": given.draft_vocab or setup.target.vocab_size,
        "int8": given.int8,
        "prompt_rows": [len(prompt) for prompt in setup.prompts],
        "long_rows": len(setup.long),
        "max_new_tokens": setup.new_tokens,
        "tree": dataclasses.asdict(setup.shape),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dtype": str(setup.target.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def summary(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of GOALS, from the parts that ran; None where one did not."""
    ran = {name: part for name, part in results.items() if name in PARTS and "error" not in part}
    figures: dict[str, float | None] = dict.fromkeys(GOALS)
    best = results["setting"]["drafters"][0]
    if step := ran.get("step"):
        figures["autoregressive_ms"] = step["plain"]["ms"]
        figures["score_60_over_autoregressive"] = step["score"]["over_plain"]
        figures["step_over_autoregressive"] = step[best]["over_plain"]
        figures["host_share"] = step[best].get("host_share_undisturbed")
    if pairs := ran.get("pairs"):
        fastest = {
            t: max(_drafted(pairs[t]), key=lambda line: line["median_speedup"]) for t in TEMPERATURES if t in pairs
        }
        figures |= {f"speedup_{t}": line["median_speedup"] for t, line in fastest.items()}
        figures["efficiency_t0"] = fastest["t0"]["efficiency"]
        figures["best_ms_a_token_t0"] = min(line["ms_a_token"] for line in _drafted(pairs["t0"]))
    if hf := ran.get("hf"):
        figures["speedup_over_hf_eager"] = hf[best]["median_speedup"]
    if (slots := ran.get("slots")) and "16" in slots:
        figures["throughput_16_slots"] = slots["16"]["on_over_off"]
    if memory := ran.get("memory"):
        over = [ratio for name, ratio in memory["over_none"].items() if name != NONE and ratio]
        figures["memory_over_none"] = max(over, default=None)
        kv = memory["kv_bytes"][best]
        if kv["measured"]:
            figures["kv_promised_over_measured"] = kv["promised"] / kv["measured"]
    return figures


def _drafted(lines: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [line for name, line in lines.items() if name != NONE]


def _print_table(results: Mapping[str, Any]) -> None:
    for part in ("pairs", "hf"):
        for group, lines in _groups(part, results.get(part, {})):
            for name, line in lines.items():
                print(f"{group:4s} {name:28s} {_row(line)}")
    for slots, line in results.get("slots", {}).items():
        if isinstance(line, dict):
            ratios = f"{line['on_over_off']:.2f}, with prefill {line['on_over_off_with_prefill']:.2f}"
            print(f"slots {slots:>3s}  speculation on / off {ratios}; tree {line['tree']}")
    if speeds := results.get("queue", {}).get("tokens_per_second"):
        queue = results["queue"]
        print(f"queue     speculation on / off {queue['on_over_off']:.2f}; {speeds}; step {queue['step_ms']}")
    print(f"\n{'figure':32s} {'measured':>9s} {'must':>7s} {'aim':>7s}")
    for name, value in summary(results).items():
        must, aim, more = GOALS[name]
        if value is None:
            print(f"{name:32s} {'-':>9s} {must:7.2f} {aim:7.2f}")
            continue
        met = [value >= goal if more else value <= goal for goal in (must, aim)]
        print(f"{name:32s} {value:9.3f} {must:7.2f} {aim:7.2f}  {('missed', 'must', 'aim')[sum(met)]}")


def _groups(part: str, result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    groups = {"hf": result} if part == "hf" else {name: result.get(name, {}) for name in TEMPERATURES}
    for group, lines in groups.items():
        yield group, {name: line for name, line in lines.items() if isinstance(line, dict) and "median_speedup" in line}


def _row(line: Mapping[str, Any]) -> str:
    low, high = line["quartiles"]
    decoding = (
        f"; decode {line['decode_speedup']:.2f}, {line['ms_a_token']:.2f} ms a token" if "ms_a_token" in line else ""
    )
    return (
        f"speedup {line['median_speedup']:.2f} ({low:.2f}-{high:.2f}{decoding})  "
        f"length {line['stats']['mean_acceptance_length']:.2f}  exact {line['exact']:.3f} of {line['prompts']}"
    )


if __name__ == "__main__":
    main()
