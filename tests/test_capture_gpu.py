"""Captured steps give the tokens of eager ones, on a CUDA device: by pytest, or by itself with words that cases hold.

    python tests/test_capture_gpu.py hivis vispec

Targets of random weights in float64 with trees so wide that paths are accepted, and the shipped testbed in float32.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import tiny  # noqa: E402 - found by the line above when this file is run by itself
from speculens.attention import plain_attention  # noqa: E402
from speculens.capture import Recorder  # noqa: E402
from speculens.checkpoints import load_drafter  # noqa: E402
from speculens.conversation import Conversation  # noqa: E402
from speculens.drafters import METHODS, LookupDrafter, NoDrafter  # noqa: E402
from speculens.engine import Engine  # noqa: E402
from speculens.sampling import Sampling  # noqa: E402
from speculens.stats import Stats  # noqa: E402
from speculens.targets import Target, load_target  # noqa: E402
from speculens.targets.base import Prompt  # noqa: E402
from speculens.targets.load import prepare  # noqa: E402
from speculens.training.config import DrafterRecipe  # noqa: E402
from speculens.training.student import make_drafter  # noqa: E402
from speculens.tree import TreeShape  # noqa: E402

CUDA = torch.cuda.is_available()
WIDE = TreeShape(num_steps=1, topk=90, num_draft_tokens=240)
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "paligemma2")
RECORDED_TOWERS = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma")
CAPACITY = 640
LENGTHS = (60, 9, 25, 40, 17, 33)  # the longest prompts here have about 200 rows: texts grow across 256 columns
GREEDY = [Sampling()] * len(LENGTHS)
SAMPLED = [
    Sampling(),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=4),
    Sampling(temperature=1.2, min_p=0.05, seed=5),
    Sampling(temperature=1.0, repetition_penalty=1.2, seed=6),
    Sampling(temperature=0.7, seed=7),
]


@functools.cache
def target(family: str) -> Target:
    return Target(tiny.model(family).to("cuda"), tiny.processor(family))


@functools.cache
def guesser(method: str, family: str):
    if method in ("none", "lookup"):
        return NoDrafter() if method == "none" else LookupDrafter()
    torch.manual_seed(7)
    drafter = make_drafter(DrafterRecipe(method), target(family))
    return drafter.to("cuda", target(family).dtype).eval().requires_grad_(False)


def requests(family: str) -> list[Prompt]:
    return [
        target(family).encode(tiny.conversation(family, images=1 + i % 3, turns=1 + 2 * (i % 3), seed=i))
        for i in range(len(LENGTHS))
    ]


def texts(engine: Engine, prompts: list[Prompt], samplings: list[Sampling], lengths=LENGTHS) -> list[list[int]]:
    settings = [replace(s, max_new_tokens=n) for s, n in zip(samplings, lengths, strict=True)]
    return [generation.tokens for generation in engine.generate_all(prompts, settings)]


def check(method: str, family: str, slots: int, samplings: list[Sampling]) -> None:
    made = dict(slots=slots, capacity=CAPACITY, shape=WIDE)
    eager = Engine(target(family), guesser(method, family), capture="off", **made)
    captured = Engine(target(family), guesser(method, family), **made)
    assert captured._recorder.on
    for _ in range(2):  # graphs are recorded in the first round and only replayed in the second
        assert texts(captured, requests(family), samplings) == texts(eager, requests(family), samplings)
    recorder = captured._recorder
    assert recorder.on, "a recording failed: see the log"
    assert recorder.replays > recorder.captures > 0


def check_warm_up(method: str) -> None:
    engine = Engine(target("llava"), guesser(method, "llava"), slots=3, capacity=CAPACITY, shape=WIDE)
    before = texts(engine, requests("llava"), GREEDY)
    engine = Engine(target("llava"), guesser(method, "llava"), slots=3, capacity=CAPACITY, shape=WIDE)
    engine.warm_up()
    captures = engine._recorder.captures
    assert (captures > 0) == (method != "lookup")  # it works on the host, so of its work prompts alone are recorded
    assert texts(engine, requests("llava"), GREEDY) == before
    assert engine._recorder.captures == captures
    assert engine._target._graphs.recorder.replays == len(LENGTHS)


def check_no_wait(method: str, family: str) -> None:
    """From the target's pass over a prompt to the first token nothing waits for the device."""
    engine = Engine(target(family), guesser(method, family), slots=2, capacity=CAPACITY, shape=WIDE)

    def unwaiting(work: Callable) -> Callable:
        def run(*args: object) -> object:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return work(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    front = engine._loop.front
    for owner, name in ((engine, "_first"), (engine._drafter, "begin")):
        setattr(owner, name, unwaiting(getattr(owner, name)))
    for name in ("prepare", "admit"):
        object.__setattr__(front, name, unwaiting(getattr(front, name)))
    asked = requests(family)[:2]
    settings = [Sampling(max_new_tokens=1), Sampling(max_new_tokens=1, temperature=1.0, top_p=0.9, seed=3)]
    assert all(generation.tokens for generation in engine.generate_all(asked, settings))


def check_pieces(family: str) -> None:
    """Prompts that are filled in piece by piece while other slots replay their steps."""
    made = dict(slots=2, capacity=CAPACITY, shape=WIDE)
    whole = Engine(target(family), guesser("eaglevlm", family), capture="off", **made)
    pieces = Engine(target(family), guesser("eaglevlm", family), prefill_chunk=37, **made)
    slots = [
        pieces.submit(p, replace(Sampling(), max_new_tokens=n)) for p, n in zip(requests(family), LENGTHS, strict=True)
    ]
    while any(slot.finish_reason is None for slot in slots):
        pieces.step()
    assert [slot.tokens for slot in slots] == texts(whole, requests(family), GREEDY)


def check_leaving(family: str, leaver: int) -> None:
    """A slot is cancelled while a round of it is under way, and another prompt comes before that round is read."""
    law, asked = Sampling(max_new_tokens=24), requests(family)[:4]
    made = dict(slots=3, capacity=CAPACITY, shape=WIDE)
    eager = Engine(target(family), guesser("eaglevlm", family), capture="off", **made)
    alone = texts(eager, asked, [law] * 4, [24] * 4)
    engine = Engine(target(family), guesser("eaglevlm", family), **made)
    for record in engine._target.recordings(engine._recorder.place):  # before steps, which then lie in their pool
        assert record()
    slots = [engine.admit(one, law).slot for one in asked[:3]]
    for _ in range(3):
        engine.step()
    assert engine._under_way
    engine.cancel(slots[leaver])
    slots.append(engine.admit(asked[3], law).slot)
    while engine.running:
        engine.step()
    kept = [tokens[: len(slot.tokens)] for slot, tokens in zip(slots, alone, strict=True)]
    assert [slot.tokens for slot in slots] == kept
    assert [slot.finish_reason == "cancelled" for slot in slots] == [number == leaver for number in range(4)]
    assert engine._recorder.on and engine._target._graphs.recorder.replays == len(asked)


def check_towers(family: str) -> None:
    """What a replayed tower gives is bit by bit what a launched one gives; one that cannot be recorded is launched."""
    made = Target(copy.deepcopy(tiny.model(family)).to("cuda"), tiny.processor(family))
    prepare(made.model)
    asked = [made.encode(tiny.conversation(family, images=1 + i % 2, turns=1 + i % 2, seed=i)) for i in range(6)]

    def entered() -> list[torch.Tensor]:
        with torch.no_grad():
            return [made.at_the_door(one.inputs, None)["inputs_embeds"].clone() for one in asked]

    launched = entered()
    made.record_towers()
    assert all(map(torch.equal, launched, entered()))
    recorder = made._towers[0].recorder
    assert not recorder.on or recorder.replays == 4
    assert recorder.on or family not in RECORDED_TOWERS


def check_testbed(name: str) -> None:
    """Real acceptance: paths of several tokens."""
    weights = ROOT / "testbed" / "weights"
    trained = load_target(str(weights / name), device="cuda", dtype=torch.float32)
    drafter = load_drafter(str(weights / f"{name}-eaglevlm"), dtype=torch.float32, device="cuda", target=trained)
    prompts = [
        trained.encode(Conversation.user(text, images=[tiny.picture(i)]))
        for i, text in enumerate(["What is drawn here?", "Describe the picture.", "Name the colours, one by one."])
    ]
    lengths = (120, 80, 40)
    for samplings in (GREEDY[:3], SAMPLED[:3]):
        eager = Engine(trained, drafter, slots=2, capacity=1024, capture="off")
        captured = Engine(trained, drafter, slots=2, capacity=1024)
        assert all(record() for record in captured._target.recordings(captured._recorder.place))
        assert texts(captured, prompts, samplings, lengths) == texts(eager, prompts, samplings, lengths)
        assert captured._recorder.on and captured._recorder.replays > 0
        assert captured._target._graphs.recorder.replays == len(prompts)


def check_int8(name: str) -> None:
    """A drafter in 8 bits guesses as well in recorded steps, by our kernels, as one in 16."""
    weights = ROOT / "testbed" / "weights"
    trained = load_target(str(weights / name), device="cuda", dtype=torch.bfloat16)
    prompts = [
        trained.encode(Conversation.user("Describe the picture.", images=[tiny.picture(number)])) for number in range(4)
    ]
    lengths = []
    for int8 in (False, True):
        drafter = load_drafter(
            str(weights / f"{name}-hivis"), dtype=torch.bfloat16, device="cuda", target=trained, int8=int8
        )
        engine = Engine(trained, drafter, slots=2, capacity=1024)
        answers = engine.generate_all(prompts, Sampling(max_new_tokens=120))
        assert engine._recorder.on and engine._recorder.replays > 0
        lengths.append(Stats.total(answer.stats for answer in answers).mean_acceptance_length)
    assert lengths[0] > 1.5
    assert abs(lengths[1] - lengths[0]) < 0.1 * lengths[0], lengths


def check_garbage() -> None:
    """Graphs that become garbage are collected at some time, but not while another one is recorded."""
    x = torch.zeros(4, device="cuda")

    def recorded(key: int) -> Recorder:
        recorder = Recorder(lambda times: [{"made": x + time} for time in range(times)], [x])
        assert recorder.ready(key)
        return recorder

    for _ in range(3):
        ring: list[object] = [recorded(1)]
        ring.append(ring)
    del ring
    limits = gc.get_threshold()
    gc.set_threshold(1, 1, 1)  # at nearly every object
    try:
        assert recorded(50).replay(50)[7]["made"].tolist() == [7] * 4
    finally:
        gc.set_threshold(*limits)


def check_plain_attention() -> None:
    """It would be planned anew by cuDNN, which torch prefers on some devices."""
    queries, keys = (torch.randn(3, 4, rows, 64, device="cuda", dtype=torch.bfloat16) for rows in (32, 96))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        plain_attention(queries, keys, keys)
        plain_attention(keys, keys, keys, is_causal=True)
        plain_attention(queries, keys, keys, attn_mask=torch.ones(3, 1, 32, 96, device="cuda").bool())
    called = [event.key for event in seen.key_averages()]
    assert "aten::scaled_dot_product_attention" in called
    assert not [name for name in called if "cudnn" in name]


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    yield from step_cases()
    yield "attention for any shape", check_plain_attention
    yield "garbage", check_garbage
    for method in ("none", "hivis", "lookup"):
        yield f"warm-up of {method}", functools.partial(check_warm_up, method)
    for method in ("none", "eaglevlm", "vispec", "hivis"):  # SpecVLM's gate decides on the host
        for family in FAMILIES[:2]:
            yield f"no wait, {method} on {family}", functools.partial(check_no_wait, method, family)
    for family in tiny.FAMILIES:
        yield f"tower of {family}", functools.partial(check_towers, family)
    for name in ("llava", "qwen2_5_vl"):
        yield f"testbed {name}", functools.partial(check_testbed, name)
        yield f"eight bits on {name}", functools.partial(check_int8, name)


def step_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for method in ("none", *METHODS):
        for family in FAMILIES if method in ("none", "eaglevlm") else FAMILIES[:2]:
            for slots in (1, 2, 3, 4) if family == "llava" else (3,):
                for name, samplings in (("greedy", GREEDY), ("sampled", SAMPLED)):
                    case = functools.partial(check, method, family, slots, samplings)
                    yield f"{method} on {family}, {slots} slots, {name}", case
    for family in FAMILIES[:2]:
        yield f"pieces on {family}", functools.partial(check_pieces, family)
        for leaver in range(3):
            yield f"slot {leaver} leaves on {family}", functools.partial(check_leaving, family, leaver)


def main(words: list[str]) -> int:
    """Without pytest: a line for each case whose name holds one of the words, or for all."""
    failed = 0
    for name, case in cases():
        if words and not any(word in name for word in words):
            continue
        try:
            case()
            print("pass", name, flush=True)  # noqa: T201
        except Exception:  # noqa: BLE001 - every case is told
            failed += 1
            print("FAIL", name, traceback.format_exc(), sep="\n", flush=True)  # noqa: T201
    return failed


try:
    import pytest
except ImportError:
    pass
else:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]

    @pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in cases()])
    def test_captured_steps_give_the_tokens_of_eager_ones(case):
        case()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if CUDA else "this needs a CUDA device")
