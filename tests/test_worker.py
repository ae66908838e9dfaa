"""The server's worker beside its test, over a pipe: who waits for whom, who is told what."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from multiprocessing import Pipe
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import oracle
import tiny
from speculens import Conversation, Engine, LookupDrafter, Sampling
from speculens.plan import Planner
from speculens.sampling import Logprob
from speculens.server import worker
from speculens.server.metrics import Metrics
from speculens.server.settings import Limits, Model
from speculens.server.wire import Ask, Cancel, Piece, Refusal
from speculens.server.worker import Worker
from speculens.targets import Target
from speculens.tree import DraftTree

CHUNK = 8
SAMPLING = {"temperature": 1.0, "seed": 3}
QUESTION, LONG = "What is this?", "word and word and " * 20


@dataclass
class Client:
    """The pipe's other end, and all that has come through it."""

    pipe: Any
    heard: list[Piece | Refusal] = field(default_factory=list)

    def ask(self, number, question=QUESTION, tokens=8, seconds=60.0, choices=1, baseline=False):
        self.pipe.send(
            Ask(
                number,
                (("user", (question,)),),
                SAMPLING | {"ignore_eos": True},
                tokens,
                choices,
                seconds,
                baseline=baseline,
            )
        )

    def until(self, sound):
        """Listen until something is told that is meant."""
        while not any(sound(event) for event in self.heard):
            assert self.pipe.poll(60), "the worker says nothing"
            self.heard += [event for event in self.pipe.recv() if isinstance(event, Piece | Refusal)]

    def until_ended(self, number):
        self.until(lambda event: event.number == number and (isinstance(event, Refusal) or event.finish_reason))

    def of(self, number):
        return [event for event in self.heard if event.number == number]

    def text(self, number):
        return "".join(text for event in self.of(number) for text, _ in event.runs)


@pytest.fixture
def engine():
    return Engine(oracle.target("llava"), LookupDrafter(), slots=2, capacity=1200, prefill_chunk=CHUNK)


def served(pipe, engine, alone):
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # as main() does
        Worker(pipe, engine, alone, Limits()).run()


@pytest.fixture
def client(engine):
    alone = Engine(engine.target, slots=1, capacity=1200, prefill_chunk=CHUNK)
    here, there = Pipe()
    running = threading.Thread(target=served, args=(there, engine, alone))
    running.start()
    yield Client(here)
    here.close()
    running.join()


def own_text(question=QUESTION, tokens=8):
    """What the target says by itself: another model of the same weights, for the worker's thread may still run it."""
    asked = Sampling(**SAMPLING, ignore_eos=True, max_new_tokens=tokens)
    other = Target(tiny.model("llava", attn="eager"), tiny.processor("llava"))
    assert other.model is not oracle.target("llava").model
    return Engine(other, capacity=1200).generate(Conversation.user(question), asked).text


@pytest.mark.parametrize("baseline", [False, True], ids=["same engine", "the other engine"])
def test_a_long_prompt_stalls_those_that_run_for_a_piece_at_a_time(client, engine, baseline, monkeypatch):
    turns = []
    step = engine.step

    def watched():
        if any(len(slot.prompt) > 100 for slot in engine.pending):
            turns.append([len(slot.tokens) for slot in engine.running])
        return step()

    monkeypatch.setattr(engine, "step", watched)
    client.ask(1, tokens=1000, baseline=baseline)
    client.until(lambda event: event.number == 1)
    client.ask(2, LONG)
    client.until_ended(2)
    pieces = -(-client.of(2)[0].prompt_tokens // CHUNK)
    assert pieces > 10
    assert len(turns) == pieces, "a step took in more than one piece"
    if not baseline:
        lengths = [length for (length,) in turns]
        assert lengths == sorted(set(lengths)), "the running slot stood still"
    assert len(client.of(1)) > pieces
    assert client.text(2) == own_text(LONG)


def test_who_leaves_while_waiting_is_forgotten_and_disturbs_nobody(client, engine):
    for number in (1, 2):
        client.ask(number, tokens=200)
        client.until(lambda event, number=number: event.number == number)
    client.ask(3, LONG, choices=2)
    client.ask(4)
    client.pipe.send(Cancel(3))
    for number in (1, 2, 4):
        client.until_ended(number)
    assert client.of(3) == []
    assert client.text(1) == own_text(tokens=200)
    assert client.text(4) == own_text()
    assert not engine.running and not engine.pending


def test_the_passes_of_who_leaves_in_between_are_counted(client):
    client.ask(1, tokens=1000)
    client.until(lambda _: len(client.of(1)) > 5)
    client.pipe.send(Cancel(1))
    client.ask(2)
    client.until_ended(2)
    assert client.of(1)[-1].finish_reason == "cancelled"
    metrics = Metrics()
    for event in client.heard:
        metrics.count(event)
    tokens, passes, kept = (
        metrics.registry.get_sample_value(f"speculens:{name}_total")
        for name in ("generation_tokens", "spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
    )
    assert tokens == 2 + passes + kept  # one of each prompt; of each pass what was kept and the target's own


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("secret"), 500, "failed"),
        (torch.OutOfMemoryError("secret"), 503, "memory"),
        (RuntimeError("can't allocate memory: secret"), 503, "memory"),
    ],
    ids=["fault", "GPU memory", "memory"],
)
@pytest.mark.parametrize("before", [0, 1], ids=["alone", "beside one"])
def test_a_prompt_that_fails_is_refused_once_and_hurts_no_other(
    client, engine, error, status, told, before, monkeypatch
):
    if before:
        client.ask(1, tokens=100)
        client.until(lambda event: event.number == 1)
    begin = engine._drafter.begin

    def failing(features, first):
        if features.tokens.shape[1] > 100:
            raise error
        return begin(features, first)

    monkeypatch.setattr(engine._drafter, "begin", failing)
    client.ask(2, LONG, choices=3)
    client.ask(3)
    client.until_ended(2)
    client.until_ended(3)
    (refusal,) = client.of(2)
    assert refusal.status == status
    assert told in refusal.message
    assert "secret" not in refusal.message
    assert client.text(3) == own_text()
    if before:
        client.until_ended(1)
        assert client.text(1) == own_text(tokens=100)


def test_what_is_late_is_cut_where_it_runs_and_refused_where_it_waits(client):
    for number in (1, 2):
        client.ask(number, tokens=1000, seconds=1.0)
    client.until(lambda event: event.number == 2)
    client.ask(3, seconds=0.5)
    for number in (1, 2, 3):
        client.until_ended(number)
    assert [client.of(number)[-1].finish_reason for number in (1, 2)] == ["length", "length"]
    (refusal,) = client.of(3)
    assert refusal.status == 503
    client.ask(4)
    client.until_ended(4)
    assert client.text(4) == own_text()


def test_tokens_are_told_with_their_spaces_and_bytes():
    words = tiny.pieces(leading_space=True)
    tokens = words.encode("a world☃", add_special_tokens=False)
    told = [worker._named(words, Logprob(token, -1.0, ((token, -1.0),))) for token in tokens]
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == " a world☃"
    assert all(entry["top_logprobs"] == [{key: entry[key] for key in entry if key != "top_logprobs"}] for entry in told)
    drawn = worker.picture(words, DraftTree.chain(torch.tensor([tokens[1:4]])), tokens[2:3])
    assert drawn == {"tokens": ["a", " world", "\ufffd"], "parents": [0, 0, 1], "accepted": [0, 1]}


def test_a_worker_with_nothing_to_do_shows_that_it_lives(client):
    for _ in range(2):
        assert client.pipe.poll(30)
        assert client.pipe.recv() == []


def test_memory_is_given_back_once_whenever_all_work_is_done(client, monkeypatch):
    given = []
    monkeypatch.setattr(worker, "give_back", lambda: given.append(1))

    def given_after(number):
        client.ask(number)
        client.until_ended(number)
        for _ in range(4):
            client.pipe.recv()  # beats of silence
        return len(given)

    first = given_after(1)  # at the start there may have been a silence, too
    assert first
    assert given_after(2) == first + 1


def test_a_model_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    here, there = Pipe()
    worker.main(there, Model(str(tmp_path)), Limits())
    (broken,) = here.recv()
    assert broken.reason.startswith("There is no model at")


LARGE = {
    "load_target": "the weights of x: give --dtype bfloat16",
    "Engine": "2 slots of 200 rows (0.00 GiB of keys and values): lower --max-num-seqs or --max-model-len",
    "warm_up": "2 slots of 200 rows (0.00 GiB of keys and values): lower --max-num-seqs or --max-model-len",
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError("[..] can't allocate memory: ..")])
@pytest.mark.parametrize(("place", "told"), LARGE.items(), ids=LARGE)
def test_a_start_without_enough_memory_names_the_knobs(monkeypatch, place, told, error):
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "load_target", lambda *_, **__: oracle.target("llava"))
    monkeypatch.setattr(worker, place, Mock(side_effect=error))
    for baseline in (True, False):
        here, there = Pipe()
        worker.main(there, Model("x", slots=2, length=200, baseline=baseline), Limits())
        (broken,) = here.recv()
        assert told in broken.reason
        assert ("--no-baseline" in broken.reason) is (baseline and place != "load_target")


@pytest.mark.parametrize("capture", ["auto", "off"])
def test_a_server_may_leave_steps_unrecorded(monkeypatch, capture):
    asked = []
    monkeypatch.setattr(worker, "load_target", lambda *_, **__: oracle.target("llava"))
    monkeypatch.setattr(worker, "Engine", lambda *given, **options: asked.append(options) or Engine(*given, **options))
    worker.load(Model("x", length=200, capture=capture))
    assert [options["capture"] for options in asked] == [capture] * 2


def test_a_server_may_size_its_trees(monkeypatch):
    monkeypatch.setattr(worker, "load_target", lambda *_, **__: oracle.target("llava"))
    monkeypatch.setattr(worker, "load_drafter", lambda *_, **__: oracle.random_eagle("llava"))
    pinned, _ = worker.load(Model("x", length=200, tree={"num_steps": 2}))
    assert [shape.num_steps for shape in pinned._plan.shapes] == [2]
    sized, alone = worker.load(Model("x", length=200, sized=True, prefill_chunk=9))
    assert isinstance(sized._plan, Planner)
    assert worker.facts(Model("x", sized=True), sized)["sized"]
    assert alone.prefill_chunk == sized.prefill_chunk == 9
    prompt = oracle.prompt("llava", oracle.Ask())
    asked = Sampling(max_new_tokens=12)
    assert sized.generate(prompt, asked).tokens == alone.generate(prompt, asked).tokens
