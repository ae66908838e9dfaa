"""Submitted requests: filled in piece by piece between the steps of others, exact, and apart from their neighbours."""

from dataclasses import replace

import pytest
import torch

import tiny
from oracle import CAPACITY, Ask, compare, oracle, prompt, random_eagle, reference, target
from speculens.drafters import LookupDrafter, NoDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets import TargetSession
from test_capture import Replica

LONG, SHORT = Sampling(max_new_tokens=24), Sampling(max_new_tokens=7)
ASKS = [Ask(), Ask(images=2, seed=1), Ask(seed=2), Ask(images=3, turns=3, seed=3)]
PLAIN = ["llava", "qwen2_5_vl", "internvl"]  # decoders that take embeddings, positions and a plain mask


def engine_for(family, asks=ASKS, slots=2, chunk=5):
    guesser = oracle(family, asks, [LONG] * len(asks))
    return Engine(target(family), guesser, slots=slots, capacity=CAPACITY, prefill_chunk=chunk)


def finish(engine):
    """Step until nothing is left; all steps."""
    steps = []
    while engine.running or engine.pending:
        steps += engine.step()
    return steps


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompts_filled_in_pieces_give_the_text_of_generate(family):
    engine = engine_for(family)
    samplings = [replace(LONG, max_new_tokens=length) for length in (9, 24, 1, 14)]
    slots = [engine.submit(prompt(family, ask), sampling) for ask, sampling in zip(ASKS, samplings, strict=True)]
    assert engine.pending == tuple(slots)
    steps = finish(engine)
    for ask, slot, sampling in zip(ASKS, slots, samplings, strict=True):
        compare(slot.tokens, reference(family, ask, sampling), f"{family}, {ask}")
        assert [token for step in steps if step.slot is slot for token in step.tokens] == slot.tokens
        assert slot.stats.num_drafts == sum(step.slot is slot for step in steps) - 1


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_features_of_a_prompt_in_pieces_are_those_of_the_whole(family, size):
    asked = prompt(family, Ask(images=2))
    whole, parts = TargetSession(target(family), 1, CAPACITY), TargetSession(target(family), 1, CAPACITY)
    logits, features = whole.prefill(asked)
    pauses, pieces = 0, parts.pieces(asked, size)
    while True:
        try:
            next(pieces)
            pauses += 1
        except StopIteration as end:
            found, seen = end.value
            break
    assert pauses == (len(asked) - 1) // size
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(seen.hidden, features.hidden)
    assert torch.equal(parts._offsets, whole._offsets)


def test_running_slots_go_on_between_the_pieces_of_a_long_prompt():
    engine = engine_for("llava", chunk=8)
    first = engine.admit(prompt("llava", ASKS[0]), LONG).slot
    asked = prompt("llava", ASKS[3])
    slot = engine.submit(asked, LONG)
    pauses = 0
    while not slot.tokens:
        before = len(first.tokens)
        engine.step()
        pauses += 1
        assert len(first.tokens) > before or first.finish_reason, "a piece stalled the running slot for a whole step"
        if first.finish_reason:
            break
    assert pauses == min(-(-len(asked) // 8), pauses)
    assert pauses > 2
    finish(engine)
    for ask, done in ((ASKS[0], first), (ASKS[3], slot)):
        compare(done.tokens, reference("llava", ask, LONG))


@pytest.mark.parametrize("leaver", [0, 1])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_slots_that_leave_while_a_prompt_is_filled_in_do_not_disturb_it(family, leaver):
    """The row being filled moves when a row below it is freed."""
    engine = engine_for(family, slots=3, chunk=6)
    running = [engine.admit(prompt(family, ask), LONG).slot for ask in ASKS[:2]]
    slot = engine.submit(prompt(family, ASKS[3]), LONG)
    engine.step()
    engine.step()
    engine.cancel(running[leaver])
    late = engine.submit(prompt(family, ASKS[2]), LONG)
    finish(engine)
    stayed = 1 - leaver
    for ask, done in ((ASKS[stayed], running[stayed]), (ASKS[3], slot), (ASKS[2], late)):
        compare(done.tokens, reference(family, ask, LONG), f"{family}, {ask}")


@pytest.mark.parametrize("drafter", [NoDrafter(), random_eagle("qwen2_5_vl")], ids=["none", "eagle"])
def test_steps_with_rows_of_padding_do_not_write_into_a_prompt_being_filled_in(drafter):
    family = "qwen2_5_vl"
    engine = Engine(target(family), drafter, slots=4, capacity=CAPACITY, prefill_chunk=6)
    engine._recorder = Replica(engine)
    slots = [engine.admit(prompt(family, ask), LONG).slot for ask in ASKS[:3]]
    slots.append(engine.submit(prompt(family, ASKS[3]), LONG))
    finish(engine)
    for ask, slot in zip(ASKS, slots, strict=True):
        compare(slot.tokens, reference(family, ask, LONG), str(ask))


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_request_that_is_cancelled_before_it_runs_leaves_no_trace(pieces):
    engine = engine_for("llava", chunk=4)
    first = engine.admit(prompt("llava", ASKS[0]), LONG).slot
    slot, other = (engine.submit(prompt("llava", ask), LONG) for ask in (ASKS[3], ASKS[1]))
    for _ in range(pieces):
        engine.step()
    engine.cancel(slot)
    assert (slot.finish_reason, slot.tokens) == ("cancelled", [])
    assert engine.pending == (other,)
    finish(engine)
    compare(first.tokens, reference("llava", ASKS[0], LONG))
    compare(other.tokens, reference("llava", ASKS[1], LONG))


def test_a_prompt_that_the_model_refuses_ends_its_own_slot_alone():
    engine = engine_for("llava")
    first = engine.admit(prompt("llava", ASKS[0]), LONG).slot
    asked = prompt("llava", ASKS[1])
    broken = engine.submit(replace(asked, inputs={**asked.inputs, "pixel_values": asked.inputs["pixel_values"][:1]}))
    after = engine.submit(prompt("llava", ASKS[2]), SHORT)
    steps = finish(engine)
    assert broken.finish_reason == "error"
    assert "mage" in str(broken.error)
    assert [step.tokens for step in steps if step.slot is broken] == [[]]
    compare(first.tokens, reference("llava", ASKS[0], LONG))
    compare(after.tokens, reference("llava", ASKS[2], SHORT))


def test_a_drafter_that_fails_on_a_prompt_ends_its_slot_alone(monkeypatch):
    engine = engine_for("llava")
    begin = engine._drafter.begin
    monkeypatch.setattr(engine._drafter, "begin", lambda *_: (_ for _ in ()).throw(ValueError("no view")))
    broken = engine.submit(prompt("llava", ASKS[0]), SHORT)
    assert [step.slot for step in finish(engine)] == [broken]
    assert "no view" in str(broken.error)
    monkeypatch.setattr(engine._drafter, "begin", begin)
    after = engine.submit(prompt("llava", ASKS[2]), SHORT)
    finish(engine)
    compare(after.tokens, reference("llava", ASKS[2], SHORT))


def test_admit_and_generate_do_not_overtake_submitted_requests():
    engine = engine_for("llava")
    engine.submit(prompt("llava", ASKS[0]), SHORT)
    with pytest.raises(RuntimeError, match="submit"):
        engine.admit(prompt("llava", ASKS[1]), SHORT)
    with pytest.raises(RuntimeError, match="running"):
        engine.generate(prompt("llava", ASKS[1]), SHORT)
    finish(engine)
    assert engine.generate(prompt("llava", ASKS[1]), SHORT).tokens == reference("llava", ASKS[1], SHORT)


def test_what_cannot_fit_is_refused_when_it_is_submitted():
    with pytest.raises(UserError, match="do not fit"):
        engine_for("llava").submit(prompt("llava", ASKS[0]), Sampling(max_new_tokens=CAPACITY))


@pytest.mark.parametrize(
    "drafter", [NoDrafter(), LookupDrafter(), random_eagle("llava")], ids=["none", "lookup", "eagle"]
)
def test_memory_is_known_before_the_first_request_and_stays(drafter):
    engine = Engine(target("llava"), drafter, slots=3, capacity=CAPACITY)
    promised = engine.kv_bytes
    rows = CAPACITY + engine._drafter.nodes
    assert promised["target"] == 3 * rows * tiny.LAYERS * 2 * 2 * 16 * 8  # layers, keys and values, heads, dim, float64
    assert (promised["drafter"] > 0) == (drafter.name == "eaglevlm")
    engine.generate_all([prompt("llava", ask) for ask in ASKS], SHORT)
    held = sum(block.nbytes for block in engine._target.cache._blocks.values())
    assert engine.kv_bytes == promised
    assert held == promised["target"]
