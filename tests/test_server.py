"""The server as clients meet it: OpenAI's own client and plain HTTP, against the command in its own process."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from benchmarks.load import fuzz, troubles

import tiny
from served import NAME, Served, body
from speculens import Conversation, Engine, Sampling, load_target
from speculens.cli import main

pytestmark = pytest.mark.xdist_group("server")  # one server for all, also with several test workers
KEY = "sesame"
HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
QUESTIONS = [f"{sentence} ({number})" for number, sentence in enumerate(tiny.SENTENCES * 4)][:16]


def data_uri(seed: int = 0) -> str:
    data = io.BytesIO()
    tiny.picture(seed).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def seen(question: str, *seeds: int) -> list[dict]:
    """A message of the user with pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("qwen2_5_vl", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def served(folder):
    options = ("--dtype", "float64", "--drafter", "lookup", "--max-num-seqs", "4", "--max-model-len", "400")
    guards = ("--api-key", KEY, "--max-images", "8", "--max-image-mp", "30", "--max-image-mb", "10")
    with Served(folder, *options, *guards, "--prefill-chunk", "64") as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(folder):
    """The target by itself, as `speculens generate --drafter none` runs it."""
    return Engine(load_target(str(folder), dtype="float64"), capacity=400)


def own_text(engine, question, images=(), **sampling):  # noqa: ANN003 - fields of Sampling
    pictures = [tiny.picture(seed) for seed in images]
    return engine.generate(Conversation.user(question, pictures), Sampling(**sampling)).text


# ---- what is answered


def test_the_text_is_generates_own(client, alone):
    told = client.chat.completions.create(
        model=NAME, messages=seen("What is this?", 0, 1), temperature=0.8, top_p=0.9, seed=7, max_tokens=24
    )
    own = own_text(alone, "What is this?", images=(0, 1), temperature=0.8, top_p=0.9, seed=7, max_new_tokens=24)
    assert told.choices[0].message.content == own
    assert told.choices[0].finish_reason == "length"
    assert told.usage.completion_tokens == 24


def test_sixteen_clients_at_once_get_what_each_would_get_alone(client, alone):
    def ask(number):
        chunks = client.chat.completions.create(
            model=NAME, messages=seen(QUESTIONS[number], number), temperature=1, seed=number, max_tokens=16, stream=True
        )
        return "".join(chunk.choices[0].delta.content for chunk in chunks)

    with ThreadPoolExecutor(16) as crowd:
        told = list(crowd.map(ask, range(16)))
    own = [own_text(alone, QUESTIONS[n], images=(n,), temperature=1.0, seed=n, max_new_tokens=16) for n in range(16)]
    assert told == own


def test_choice_i_has_the_text_of_seed_plus_i(client, alone):
    told = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Go."}], temperature=1, seed=3, n=6, max_tokens=6
    )
    own = [own_text(alone, "Go.", temperature=1.0, seed=3 + i, max_new_tokens=6) for i in range(6)]
    assert [choice.message.content for choice in told.choices] == own
    assert told.usage.completion_tokens == 36


def test_a_stop_string_is_left_out_whole_and_streamed(client, alone):
    whole = own_text(alone, "Go.", max_new_tokens=40)
    stop = whole[12:15]
    want = whole[: whole.index(stop)]
    asked = dict(model=NAME, messages=[{"role": "user", "content": "Go."}], temperature=0, max_tokens=40, stop=[stop])
    choice = client.chat.completions.create(**asked).choices[0]
    assert (choice.message.content, choice.finish_reason) == (want, "stop")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.delta.content for chunk in chunks) == want
    assert chunks[-1].finish_reason == "stop"


def test_logprobs_name_the_tokens_that_were_emitted(client):
    told = client.chat.completions.create(
        model=NAME, messages=seen("Go.", 0), temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    entries = told.choices[0].logprobs.content
    assert len(entries) == 12
    for entry in entries:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert len(entry.top_logprobs) == 3


def test_usage_and_figures_come_with_the_last_chunk(client):
    *_, last = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Go."}],
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert last.choices == []
    assert last.usage.completion_tokens == 8
    assert last.metrics["speculative_decoding"]["num_tokens"] == 7


@pytest.mark.parametrize("baseline", [False, True])
def test_steps_show_runs_and_trees(client, baseline):
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=seen("Go on and on.", 0),
            temperature=0,
            max_tokens=32,
            stream=True,
            extra_body={"speculens": {"steps": True, "baseline": baseline}},
        )
    )
    parts = [chunk.speculens for chunk in chunks]
    assert sum(part["tokens"] for part in parts) == 32
    assert parts[0]["tree"] is None
    for chunk, part in zip(chunks, parts, strict=True):
        assert "".join(run["text"] for run in part["runs"]) == chunk.choices[0].delta.content
    for part in parts[1:]:
        path, parents = part["tree"]["accepted"], part["tree"]["parents"]
        assert len(path) == part["accepted"] + 1
        assert [parents[node] for node in path] == [0, *path[:-1]]
        assert len(part["tree"]["tokens"]) == len(parents)
    assert any(len(part["tree"]["tokens"]) > 1 for part in parts[1:]) is not baseline


def test_an_answer_can_be_handed_back_as_the_client_gave_it(client):
    question = {"role": "user", "content": "Go."}
    asked = {"model": NAME, "max_tokens": 4}
    first = client.chat.completions.create(messages=[question], **asked).choices[0].message
    again = client.chat.completions.create(messages=[question, first.model_dump(), question], **asked)
    assert again.usage.completion_tokens == 4


def test_repeats_are_kept_out_as_generate_keeps_them_out(client, alone):
    told = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "Go."}],
        temperature=1,
        seed=39,
        max_tokens=60,
        extra_body={"no_repeat_ngram_size": 1, "ignore_eos": True},
    )
    drawn = {"temperature": 1.0, "seed": 39, "max_new_tokens": 60}
    own = own_text(alone, "Go.", **drawn, no_repeat_ngram_size=1, ignore_eos=True)
    assert told.choices[0].message.content == own != own_text(alone, "Go.", **drawn)


def test_models_health_and_metrics_tell_what_is_there(client, served):
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.speculens["family"] == "qwen2_5_vl"
    facts = {
        "slots": 4,
        "baseline": True,
        "sized": False,
        "remote_images": False,
        "limits": {"images": 8, "image_pixels": 30_000_000, "image_bytes": 10 * 2**20},
    }
    assert model.speculens | facts == model.speculens
    assert client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="no model 'some/other'") as none:
        client.models.retrieve("some/other")
    assert none.value.code == "model_not_found"
    assert served.until_idle()["status"] == "ok"
    served.ask()
    exposed = served.http.get("/metrics").text
    for name in ("num_drafts_total", "num_draft_tokens_total"):
        (value,) = [
            line.split()[1] for line in exposed.splitlines() if line.startswith(f"speculens:spec_decode_{name}")
        ]
        assert float(value) > 0


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "other"}, "no model 'other'"),
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"tempratur": 1}, "tempratur"),
        ({"max_tokens": 500}, "do not fit"),
        ({"messages": [{"role": "user", "content": "word " * 500}]}, "do not fit"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"stop": ["."] * 17}, "at most 16"),
        ({"stop": ["."] * 3 + [""]}, "stop.3: "),
        ({"tools": [{"type": "function"}]}, "does not support"),
        ({"frequency_penalty": 0.5}, "does not support"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "unicode"),
        ({"messages": [{"role": "user", "content": "<|image_pad|>"}]}, "reworded"),
        ({"messages": seen("Hm?", *range(9))}, "8 pictures"),
    ],
)
def test_a_bad_request_is_told_why(served, fields, reason):
    answer = served.http.post(
        "/v1/chat/completions", content=json.dumps(body(**fields)), headers={"content-type": "application/json"}
    )
    assert answer.status_code == (404 if "model" in fields else 400)
    assert reason in answer.json()["error"]["message"]
    assert "[" not in answer.json()["error"]["message"], "names of pydantic's own"


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "ftp://x/y.png", "https://example.com/a.png", "-"]
)
def test_no_file_and_no_address_is_read_for_a_picture(served, url):
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    answer = served.ask(messages=asked)
    assert answer.status_code == 400
    assert "data URI" in answer.json()["error"]["message"]


def test_a_failing_request_hurts_no_other(served, alone):
    with ThreadPoolExecutor(8) as crowd:
        bad = [crowd.submit(served.ask, max_tokens=999) for _ in range(4)]
        good = [crowd.submit(served.ask) for _ in range(4)]
    assert {one.result().status_code for one in bad} == {400}
    own = own_text(alone, "What is in the picture?", max_new_tokens=8)
    assert {one.result().json()["choices"][0]["message"]["content"] for one in good} == {own}


def test_a_full_queue_says_when_to_come_back(served):
    answers = [served.ask(n=16), served.ask(n=16, max_tokens=1)]
    assert [answer.status_code for answer in answers] == [200, 200]
    with ThreadPoolExecutor(3) as crowd:
        told = list(crowd.map(lambda _: served.ask(n=16, max_tokens=24), range(3)))
    refused = [answer for answer in told if answer.status_code == 429]
    assert len(refused) == 1
    assert refused[0].headers["retry-after"] == "1"


@pytest.mark.parametrize("key", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}], ids=str)
def test_without_the_key_nothing_is_told(served, key):
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert httpx.get(served.url + path, headers=key).status_code == 401
    assert httpx.post(f"{served.url}/v1/chat/completions", headers=key, json=body()).status_code == 401
    assert httpx.get(f"{served.url}/health").status_code == 200


@contextmanager
def asking(served, request):
    """A connection on which a request was sent and nothing is read."""
    place, data = urlsplit(served.url), json.dumps(request).encode()
    head = f"{HEAD}content-length: {len(data)}\r\ncontent-type: application/json\r\n\r\n"
    with socket.create_connection((place.hostname, place.port)) as stream:
        stream.sendall(head.encode() + data)
        yield


def raw(served, request, size=200):
    """Bytes to the server, and the first of its answer."""
    place = urlsplit(served.url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as stream:
        stream.sendall(request)
        return stream.recv(size)


def test_bodies_are_limited_announced_or_in_pieces(served):
    head = HEAD.encode()
    assert b" 413 " in raw(served, head + b"content-length: 1099511627776\r\n\r\n")
    piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    chunked = head + b"transfer-encoding: chunked\r\n\r\n" + piece * 32 + b"1\r\n \r\n"
    assert b" 413 " in raw(served, chunked)


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}], ids=str
)
def test_a_page_elsewhere_cannot_use_this_machines_server(served, headers):
    assert served.http.get("/v1/models", headers=headers).status_code == 403
    assert served.http.get("/v1/models", headers={"origin": served.url}).status_code == 200


def test_answers_tell_nothing_that_they_need_not(served):
    answer = served.http.get("/health")
    assert "server" not in answer.headers
    assert "default-src 'none'" in answer.headers["content-security-policy"]


# ---- trouble


def test_a_client_that_leaves_frees_its_slot(served):
    with served.http.stream("POST", "/v1/chat/completions", json=body(stream=True, max_tokens=300, n=4)) as response:
        next(response.iter_lines())
    served.until_idle()
    with asking(served, body(max_tokens=300)):  # one that would get the answer whole
        served.until_health(lambda health: health["running"] == 1)
    served.until_idle()


def test_a_client_that_does_not_read_slows_no_other(served):
    with asking(served, body(stream=True, max_tokens=300, speculens={"steps": True})):
        assert served.ask().status_code == 200


def test_odd_inputs_are_answered_with_a_reason(served):
    counts, faults = fuzz(served.http, troubles(5, range(200), NAME))
    assert faults == []
    assert counts["sound: 200"] > 5
    assert served.until_idle()["status"] == "ok"
    assert "Traceback" not in served.log


def test_the_schema_finds_no_fault_in_the_server(served):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings  # noqa: PLC0415 - only where schemathesis is

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"})
    seen = set()
    for operation in (found.ok() for found in schema.get_all_operations()):

        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            answer = case.call(headers={"authorization": f"Bearer {KEY}"})
            seen.add((case.operation.path, answer.status_code))
            assert answer.status_code < 500, answer.text

        check()
    assert {path for path, _ in seen} == {
        "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/health", "/metrics",
    }  # fmt: skip


def test_log_lines_hold_no_prompt(served):
    secret = "the word is swordfish"
    served.ask(question=secret)
    served.ask(question=secret, messages=seen(secret, 0))
    assert "POST '/v1/chat/completions' 200" in served.log
    assert "swordfish" not in served.log


# ---- life and death: the last tests, for they end the server


def test_a_killed_worker_is_told_and_replaced(served):
    with served.http.stream("POST", "/v1/chat/completions", json=body(stream=True, max_tokens=300, n=4)) as response:
        lines = response.iter_lines()
        next(lines)
        served.worker.kill()
        last = [line for line in lines if line][-1]
    assert "SIGKILL" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert served.ask().status_code == 503
    health = served.http.get("/health")
    assert health.status_code == 503
    assert "SIGKILL" in health.json()["reason"]
    served.until("ok")
    assert served.ask().status_code == 200


def test_the_end_lets_answers_finish_and_a_second_signal_tells_those_that_have_not(served):
    short, long = (body(stream=True, max_tokens=tokens, n=n) for tokens, n in ((40, 1), (300, 16)))
    with (
        served.http.stream("POST", "/v1/chat/completions", json=short) as first,
        served.http.stream("POST", "/v1/chat/completions", json=long) as second,
    ):
        lines, others = first.iter_lines(), second.iter_lines()
        next(lines), next(others)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert served.ask().json()["error"]["code"] == "draining"
        assert [line for line in lines if line][-1] == "data: [DONE]"
        served.process.send_signal(signal.SIGTERM)
        last = [line for line in others if line][-1]
    assert "the server has ended" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert served.process.wait(20) == -signal.SIGTERM
    assert "Traceback" not in served.log


def told(monkeypatch, *options: str):
    """What the server is told at its start by a command."""
    kept = []
    monkeypatch.setattr("speculens.server.run.serve", lambda settings, _: kept.append(settings))
    status = main(["serve", "somewhere", *options])
    return status, *kept


def test_what_the_engine_does_is_passed_on(monkeypatch):
    _, plain = told(monkeypatch)
    assert (plain.model.sized, plain.model.warm_up, plain.model.prefill_chunk) == (False, True, 512)
    _, other = told(monkeypatch, "--tree", "auto", "--no-warm-up", "--prefill-chunk", "64", "--worker-timeout", "9")
    assert (other.model.sized, other.model.warm_up, other.model.prefill_chunk) == (True, False, 64)
    assert other.limits.silent_seconds == 9
    for option in ("--topk", "--num-draft-tokens"):
        assert told(monkeypatch, "--tree", "auto", option, "0") == (2,)
    for words, nodes in (([], 5), (["--num-draft-tokens", "0"], 0)):  # 0 is for the worker to refuse
        config = '{"method": "ngram", "num_speculative_tokens": 4}'
        _, named = told(monkeypatch, "--speculative-config", config, *words)
        assert named.model.tree == {"num_draft_tokens": nodes}


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be served" in capsys.readouterr().err
