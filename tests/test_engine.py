"""Slots, steps, ends and errors: what a caller of the engine may rely on."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3Model, LlavaModel

import speculens.engine
import tiny
from oracle import (
    CAPACITY,
    DRAFTERS,
    Ask,
    compare,
    drafter,
    oracle,
    prompt,
    random_eagle,
    reference,
    steps,
    target,
)
from speculens.drafters import LookupDrafter, NoDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets import Target, TargetSession
from speculens.tree import DraftTree, TreeShape

LONG = Sampling(max_new_tokens=24)
SHORT = Sampling(max_new_tokens=8)


def engine_for(family, *asks: Ask, slots=1):
    return Engine(target(family), oracle(family, asks, [LONG] * len(asks)), slots=slots, capacity=CAPACITY)


def assert_usable(engine, family):
    """Every slot is free, and the next request is as if nothing had happened."""
    asks = [Ask(seed=5 + i) for i in range(engine.slots)]
    assert not engine.running
    for ask, got in zip(asks, engine.generate_all([prompt(family, a) for a in asks], SHORT), strict=True):
        compare(got.tokens, reference(family, ask, SHORT), family)
    assert not engine.running


# Steps


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_steps_add_up_to_the_generation(family, name):
    ask = Ask(seed=1)
    guesser = drafter(name, family, [ask], [LONG])
    parts = steps(family, guesser, ask, LONG)
    whole = Engine(target(family), guesser, capacity=CAPACITY).generate(prompt(family, ask), LONG)
    assert [token for step in parts for token in step.tokens] == whole.tokens
    assert "".join(step.text for step in parts) == whole.text
    assert (parts[0].tree, parts[0].accepted, len(parts[0].tokens)) == (None, 0, 1)
    stats = whole.stats
    assert stats.num_visual_tokens == prompt(family, ask).image.sum() > 0
    assert stats.drafter_prefill_ratio == (name == "eagle")  # the others keep no row of the prompt
    assert stats.num_drafts == len(parts) - 1
    assert stats.num_tokens == len(whole.tokens) - 1
    assert stats.num_accepted_tokens == sum(step.accepted for step in parts)
    assert stats.num_draft_tokens == sum(int(step.tree.live.sum()) - 1 for step in parts[1:])
    assert set(stats.seconds) == {"prefill", "draft", "score", "choose", "observe"}


def test_padding_is_not_counted_as_drafted():
    """Slots that find different amounts to copy share a tree's size."""
    engine = Engine(target("llava"), LookupDrafter(), slots=2, capacity=CAPACITY)
    slots = [engine.admit(prompt("llava", Ask(seed=seed)), LONG).slot for seed in (0, 1)]
    drafted, padding = dict.fromkeys(slots, 0), 0
    while engine.running:
        for step in engine.step():
            live = int(step.tree.live.sum())
            drafted[step.slot] += live - 1
            padding += step.tree.size - live
    assert padding > 0
    assert [slot.stats.num_draft_tokens for slot in slots] == list(drafted.values())


@pytest.mark.parametrize(
    ("own", "largest"),
    [((4, 4, 14), (5, 10, 60)), ((7, 4, 30), (7, 10, 60)), ((3, 4, 64), (5, 10, 64)), ((8, 12, 80), (8, 12, 80))],
)
def test_the_largest_tree_on_a_gpu_is_roomy_in_every_respect_and_never_less_than_the_drafters_own(own, largest):
    fake = SimpleNamespace(
        target=SimpleNamespace(device=torch.device("cuda")),
        drafter=SimpleNamespace(describe=lambda: {"tree": vars(TreeShape(*own))}),
        _facts=dict,
    )
    assert Engine._planned(fake, "auto").shapes[-1] == TreeShape(*largest)


def test_accepted_tokens_of_a_step_are_a_path_of_its_tree():
    for step in steps("llava", oracle("llava", [Ask()], [LONG]), Ask(), LONG)[1:]:
        node = 0
        for token in step.tokens[: step.accepted]:
            children = (step.tree.parents[0] == node) & (step.tree.tokens[0] == token) & step.tree.live[0]
            children[0] = False
            (node,) = children.nonzero().flatten().tolist()
        assert len(step.tokens) - step.accepted in (0, 1)  # the bonus, unless the text ended before it


def test_cut_falls_inside_an_accepted_path_and_only_emitted_tokens_are_counted(monkeypatch):
    """What lies behind an end-of-text token was accepted by the tree, and must be neither emitted nor counted."""
    text = reference("llava", Ask(), LONG)
    accepted = []
    follow = DraftTree.follow

    def spy(tree, want):
        path, counts = follow(tree, want)
        accepted.append(int(counts[0]))
        return path, counts

    monkeypatch.setattr(DraftTree, "follow", spy)
    cut_inside = 0
    for end in range(1, 16):
        monkeypatch.setattr(tiny.model("llava").generation_config, "eos_token_id", text[end])
        first = text.index(text[end])
        accepted.clear()
        got = engine_for("llava", Ask()).generate(prompt("llava", Ask()), LONG)
        assert got.tokens == text[: first + 1]
        assert got.stats.num_tokens == first
        assert got.stats.num_accepted_tokens <= first
        cut_inside += sum(accepted) > first
    assert cut_inside > 5


def test_end_of_text_as_the_very_first_token_needs_no_pass(monkeypatch):
    first = reference("llava", Ask(), SHORT)[0]
    monkeypatch.setattr(tiny.model("llava").generation_config, "eos_token_id", first)
    engine = engine_for("llava", Ask())
    got = engine.generate(prompt("llava", Ask()), SHORT)
    assert (got.tokens, got.finish_reason, got.stats.num_drafts) == ([first], "stop", 0)
    assert not engine.running


def test_on_step_reports_each_request_under_its_own_number():
    asks = [Ask(seed=seed) for seed in range(4)]
    seen = {number: [] for number in range(4)}
    got = engine_for("llava", *asks, slots=2).generate_all(
        [prompt("llava", ask) for ask in asks],
        [replace(LONG, max_new_tokens=length) for length in (5, 12, 1, 7)],
        lambda number, step: seen[number].extend(step.tokens),
    )
    assert [seen[number] for number in range(4)] == [g.tokens for g in got]


def test_one_engine_gives_the_same_text_again_and_again():
    engine = engine_for("qwen2_5_vl", Ask(), slots=2)
    texts = [engine.generate(prompt("qwen2_5_vl", Ask()), LONG).tokens for _ in range(3)]
    assert texts == [reference("qwen2_5_vl", Ask(), LONG)] * 3


def test_a_conversation_is_encoded_by_the_target():
    asked = tiny.conversation("llava", seed=2)
    got = Engine(target("llava"), capacity=CAPACITY).generate(asked, SHORT)
    assert got.tokens == reference("llava", Ask(seed=2), SHORT)


# Leaving early


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_cancelling_one_of_three_leaves_the_others_and_the_next_unaffected(family, row):
    asks = [Ask(images=1 + i % 2, seed=i) for i in range(3)]
    engine = engine_for(family, *asks, Ask(seed=4), slots=3)
    slots = [engine.admit(prompt(family, ask), LONG).slot for ask in asks]
    engine.step()
    engine.cancel(slots[row])
    assert slots[row].finish_reason == "cancelled"
    asks.append(Ask(seed=4))
    slots.append(engine.admit(prompt(family, asks[3]), LONG).slot)
    while engine.running:
        engine.step()
    for number, (ask, slot) in enumerate(zip(asks, slots, strict=True)):
        text = reference(family, ask, LONG)
        compare(slot.tokens, text[: len(slot.tokens)] if number == row else text, str(ask))
    engine.cancel(slots[0])  # nothing happens to a slot that has ended
    assert_usable(engine, family)


@pytest.mark.parametrize("steps_taken", [1, 2, 3])
def test_leaving_the_stream_early_frees_the_slot(steps_taken):
    engine = engine_for("llava", Ask())
    stream = engine.stream(prompt("llava", Ask()), LONG)
    for _ in range(steps_taken):
        next(stream)
    assert len(engine.running) == 1
    stream.close()
    assert_usable(engine, "llava")


def test_no_slot_left_is_an_error():
    engine = engine_for("llava", Ask())
    engine.admit(prompt("llava", Ask()), LONG)
    with pytest.raises(RuntimeError, match="1 slots are running"):
        engine.admit(prompt("llava", Ask()), LONG)


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_second_request_while_one_streams_is_an_error_and_disturbs_nothing(way):
    engine = engine_for("llava", Ask(), slots=2)
    stream = engine.stream(prompt("llava", Ask()), LONG)
    tokens = list(next(stream).tokens)
    with pytest.raises(RuntimeError, match="admit and step"):
        next(
            iter(
                [engine.generate(prompt("llava", Ask()))]
                if way == "generate"
                else engine.stream(prompt("llava", Ask()))
            )
        )
    compare(tokens + [token for step in stream for token in step.tokens], reference("llava", Ask(), LONG))


# Faults


def broken_pixels(family):
    """A prompt with fewer pictures than placeholders."""
    asked = prompt(family, Ask(images=2))
    inputs = {**asked.inputs, "pixel_values": asked.inputs["pixel_values"][:1]}
    return replace(asked, inputs=inputs)


def failing_once(method):
    """`method`, but its next call raises."""
    left = [1]

    def fails(*args: object, **kwargs: object):
        if left and left.pop():
            raise MemoryError
        return method(*args, **kwargs)

    return fails


@pytest.mark.parametrize("busy", [False, True])
def test_a_prompt_that_the_model_refuses_leaves_the_engine_usable(busy):
    engine = engine_for("llava", Ask(), slots=2)
    other = engine.admit(prompt("llava", Ask()), LONG).slot if busy else None
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        engine.admit(broken_pixels("llava"), LONG)
    while engine.running:
        engine.step()
    if other:
        compare(other.tokens, reference("llava", Ask(), LONG))
    assert_usable(engine, "llava")


def break_begin(engine, monkeypatch):
    monkeypatch.setattr(engine._drafter, "begin", failing_once(engine._drafter.begin))


def break_drafter(engine, monkeypatch):
    monkeypatch.setattr(engine.drafter, "enter", failing_once(engine.drafter.enter))


def break_calibration(engine, monkeypatch):
    monkeypatch.setattr(engine.target, "calibrate", failing_once(engine.target.calibrate))


def break_choice(_engine, monkeypatch):
    monkeypatch.setattr(speculens.engine, "choose", failing_once(speculens.engine.choose))


@pytest.mark.parametrize("sabotage", [break_calibration, break_choice, break_begin, break_drafter])
@pytest.mark.parametrize("busy", [False, True])
def test_a_fault_in_or_after_the_prefill_leaves_the_engine_usable(sabotage, busy, monkeypatch):
    engine = Engine(target("llava"), random_eagle("llava"), slots=2, capacity=CAPACITY)
    other = engine.admit(prompt("llava", Ask()), LONG).slot if busy else None
    sabotage(engine, monkeypatch)
    with pytest.raises(MemoryError):
        engine.admit(prompt("llava", Ask(seed=1)), LONG)
    while engine.running:
        engine.step()
    if other:
        compare(other.tokens, reference("llava", Ask(), LONG))
    assert_usable(engine, "llava")


@pytest.mark.parametrize("method", ["score", "keep"])
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_fault_in_a_step_frees_the_slot(method, way, monkeypatch):
    engine = engine_for("llava", Ask())
    monkeypatch.setattr(engine._target, method, failing_once(getattr(engine._target, method)))
    with pytest.raises(MemoryError):
        list(engine.stream(prompt("llava", Ask()), LONG)) if way == "stream" else engine.generate(
            prompt("llava", Ask()), LONG
        )
    assert_usable(engine, "llava")


def test_a_request_that_overflowed_does_not_poison_its_successors():
    """NaN keys and values of a request that is gone lie in masked columns, and 0 times NaN is NaN."""
    family = "llava"
    engine = Engine(target(family), slots=3, capacity=CAPACITY)
    asked = prompt(family, Ask(images=3, turns=3))
    poison = replace(asked, inputs={**asked.inputs, "pixel_values": asked.inputs["pixel_values"] * float("nan")})
    engine.generate_all([poison] * 3, SHORT)
    asks = [Ask(images=0), Ask(images=3, turns=3, seed=2), Ask(seed=1)]
    for ask, got in zip(asks, engine.generate_all([prompt(family, ask) for ask in asks], LONG), strict=True):
        compare(got.tokens, reference(family, ask, LONG), str(ask))


def test_the_models_own_state_is_neither_used_nor_needed(monkeypatch):
    """`rope_deltas` on a Qwen model belongs to whoever ran last."""
    engine = engine_for("qwen2_5_vl", Ask())
    stream = engine.stream(prompt("qwen2_5_vl", Ask()), LONG)
    tokens = list(next(stream).tokens)
    for step in stream:
        tokens += step.tokens
        monkeypatch.setattr(tiny.model("qwen2_5_vl").model, "rope_deltas", torch.tensor([[777]]))
    compare(tokens, reference("qwen2_5_vl", Ask(), LONG))


# Threads


@pytest.mark.parametrize("name", ["none", "oracle"])
def test_a_step_in_one_thread_goes_on_while_another_fills_a_prompt_in(name, monkeypatch):
    """A prompt is filled in by a hook on the text decoder, which steps of other engines call."""
    family, asks = "gemma3", [Ask(), Ask(seed=1)]
    running = Engine(target(family), drafter(name, family, asks[:1], [LONG]), capacity=CAPACITY)
    slot = running.admit(prompt(family, asks[0]), LONG).slot
    merge, turns = Gemma3Model.get_placeholder_mask, []

    def meanwhile(*args: object, **kwargs: object):
        if not turns:
            turns.append(len(slot.tokens))
            while running.running:
                in_another_thread(running.step)
        return merge(*args, **kwargs)

    monkeypatch.setattr(Gemma3Model, "get_placeholder_mask", meanwhile)
    filled = Engine(target(family), capacity=CAPACITY).generate(prompt(family, asks[1]), SHORT)
    assert turns == [1], "the step ran beside the prompt"
    compare(slot.tokens, reference(family, asks[0], LONG))
    compare(filled.tokens, reference(family, asks[1], SHORT))


def in_another_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


def test_prompts_of_one_target_are_filled_in_one_after_the_other(monkeypatch):
    merge, inside, most = LlavaModel.get_placeholder_mask, [], []
    asks = [Ask(images=1 + i % 2, seed=i) for i in range(3)]

    def watched(*args: object, **kwargs: object):
        inside.append(None)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()
        return merge(*args, **kwargs)

    def answers(number):
        engine = Engine(target("llava"), capacity=CAPACITY)
        return [engine.generate(prompt("llava", ask), SHORT).tokens for ask in asks[number:] + asks[:number]]

    wanted = [reference("llava", ask, SHORT) for ask in asks]
    monkeypatch.setattr(LlavaModel, "get_placeholder_mask", watched)
    with ThreadPoolExecutor(3) as pool:
        for number, got in enumerate(pool.map(answers, range(3))):
            assert got == wanted[number:] + wanted[:number]
    assert most == [1] * 9


# Refusals


def test_a_request_that_does_not_fit_is_refused_with_both_numbers():
    asked = prompt("llava", Ask())
    engine = Engine(target("llava"), capacity=len(asked) + 9)
    with pytest.raises(UserError, match=rf"{len(asked)} prompt tokens and 10 .* {len(asked) + 9} "):
        engine.generate(asked, Sampling(max_new_tokens=10))
    assert len(engine.generate(asked, Sampling(max_new_tokens=9)).tokens) == 9


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_last_row_of_the_capacity_can_be_used(name):
    sampling = Sampling(max_new_tokens=12)
    asked = prompt("llava", Ask())
    guesser = drafter(name, "llava", [Ask()], [sampling])
    engine = Engine(target("llava"), guesser, slots=2, capacity=len(asked) + 12)
    for got in engine.generate_all([asked] * 3, sampling):
        compare(got.tokens, reference("llava", Ask(), sampling))


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(monkeypatch):
    made = tiny.model("llava")
    monkeypatch.setattr(made.config.get_text_config(), "max_position_embeddings", 30)
    asked = prompt("llava", Ask())
    with pytest.raises(UserError, match=rf"{len(asked)} tokens.* 30"):
        Engine(Target(made, tiny.processor("llava"))).generate(asked, SHORT)


def test_slots_that_are_longer_than_the_context_are_refused_with_both_numbers():
    context = target("llava").context
    with pytest.raises(UserError, match=rf"{context + 1} rows.* {context},"):
        Engine(target("llava"), capacity=context + 1)


def test_one_call_takes_a_loaded_drafter_and_a_prompt_of_any_length_that_the_model_takes(monkeypatch):
    model = tiny.model("llava")
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", 6000)
    made = Target(model, tiny.processor("llava"))
    asked = "one two three " * 900
    answer = speculens.generate(made, asked, drafter=LookupDrafter(), max_new_tokens=4)
    assert answer.stats.num_prompt_tokens > 4096
    assert len(answer.tokens) == 4
    with pytest.raises(UserError, match=r"lower max_new_tokens\."):
        speculens.generate(made, asked, max_new_tokens=6000)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_hidden_size", 128, ["hidden size", "128", "64"]),
        ("target_vocab_size", 9, ["vocabulary", "9", "401"]),
        ("target_family", "qwen2_vl", ["qwen2_vl", "llava"]),
    ],
)
def test_a_drafter_for_another_target_is_refused_with_both_numbers(field, value, words, monkeypatch):
    guesser = random_eagle("llava")
    monkeypatch.setattr(guesser, "config", replace(guesser.config, **{field: value}))
    with pytest.raises(UserError) as error:
        Engine(target("llava"), guesser)
    assert all(word in str(error.value) for word in words)


def test_a_conversation_without_a_processor_is_refused():
    with pytest.raises(UserError, match="processor"):
        Engine(Target(tiny.model("llava")), capacity=CAPACITY).generate(tiny.conversation("llava"), SHORT)


def test_without_a_processor_tokens_come_without_text():
    got = Engine(Target(tiny.model("llava")), capacity=CAPACITY).generate(prompt("llava", Ask()), SHORT)
    assert (got.tokens, got.text) == (reference("llava", Ask(), SHORT), "")


def test_a_session_holds_no_reference_to_a_freed_request():
    """Offsets of a freed row are not inherited by the next request."""
    session = TargetSession(target("qwen2_5_vl"), 1, CAPACITY)
    logits = {}
    for turn, ask in enumerate((Ask(images=0), Ask(images=3), Ask(images=0))):
        session.prefill(prompt("qwen2_5_vl", ask))
        logits[turn], _ = session.score(DraftTree.root(torch.tensor([9])))
        session.free(0)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1])


def test_default_is_no_drafter():
    assert isinstance(Engine(target("llava"), capacity=CAPACITY).drafter, NoDrafter)
