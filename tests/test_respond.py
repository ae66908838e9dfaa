"""respond: the target's own answers, the same whatever the order, the slots, the drafter or a kill in between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import oracle
import tiny
from jsonlines import read, write
from speculens import Conversation, Engine, Sampling, Target, UserError, cli
from speculens.checkpoints import save_drafter
from speculens.conversation import Message
from speculens.data import JsonLines
from speculens.data.journal import Journal
from speculens.data.respond import Asking, Responder, put
from speculens.drafters import LookupDrafter, lookup
from speculens.drafters.base import Prefilled
from speculens.training.config import load

FAMILY = "llava"
ASKING = Asking(templates=("{prompt} At length.",), max_new_tokens=12, seed=3)
ROOT = Path(__file__).parents[1]


def rows_of(count, old="An old answer."):
    """Questions with and without a picture, one or two turns each."""
    for n in range(count):
        picture = [{"type": "image", "path": f"{n % 2}.png"}] if n % 3 else []
        yield {
            "id": f"r{n}",
            "messages": [
                {"role": "user", "content": [*picture, {"type": "text", "text": f"Question {n}?"}]},
                {"role": "assistant", "content": old},
                *([{"role": "user", "content": "And then?"}] if n % 4 == 1 else []),
            ],
            "category": n % 2,
        }


def by_id(path):
    rows = read(path)
    assert len({row["id"] for row in rows}) == len(rows), "a row is doubled"
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    for n in range(2):
        tiny.picture(n, tiny.SIZES[n]).save(made / f"{n}.png")
    write(made / "rows.jsonl", rows_of(8))
    return made


@pytest.fixture(scope="module")
def target():
    return oracle.target(FAMILY)


def answer(source, out, target, asking=ASKING, drafter=None, slots=3, capacity=256, limit=None, **options: object):
    engine = Engine(target, drafter, slots=slots, capacity=capacity)
    responder = Responder(engine, source, asking, out, "tiny", limit)
    return responder.run(**options)


@pytest.fixture(scope="module")
def alone(folder, target):
    """Every row answered one after the other, without a drafter."""
    out = folder / "alone.jsonl"
    outcome = answer(JsonLines([folder / "rows.jsonl"]), out, target, slots=1)
    assert (outcome.success, outcome.error, outcome.skipped) == (8, 0, 0)
    return by_id(out)


# --- what is asked, and what is written


def test_rows_are_the_engines_own_answers(alone, folder, target):
    for row, before in zip(alone.values(), rows_of(8), strict=True):
        assert (row["id"], row["category"]) == (before["id"], before["category"])
        conversation = Conversation.from_row(row, folder)
        for turn, message in enumerate(conversation.messages):
            if message.role == "user":
                assert message.content[-1].endswith("? At length.")
                asked = Conversation(conversation.messages[: turn + 1])
                done = Engine(target, capacity=256).generate(asked, ASKING.sampling(row["id"], turn // 2))
                assert conversation.messages[turn + 1] == Message("assistant", (done.text.lstrip(),))
        assert len(conversation.messages) == (4 if len(before["messages"]) == 3 else 2)
        assert {k: v for k, v in row["metadata"].items() if k != "settings"} == {
            "target": "tiny",
            "temperature": 1.0,
            "max_tokens": 12,
            "finish_reason": "length",
        }
    assert "An old answer." not in json.dumps(alone)


def test_each_row_draws_its_own():
    seeds = {Asking(seed=s).sampling(n, t).seed for s in range(3) for n in ("a", "b", 1) for t in range(3)}
    assert len(seeds) == 27
    assert min(seeds) >= 0
    assert Asking().sampling("a", 0) == Sampling(
        temperature=1.0, max_new_tokens=1024, seed=Asking().sampling("a", 0).seed
    )


def test_old_answers_do_not_matter(alone, folder, target, tmp_path):
    rows = write(folder / "other.jsonl", rows_of(4, old="Something else."))
    answer(JsonLines([rows]), tmp_path / "out.jsonl", target)
    texts = [[m["content"] for m in row["messages"]] for row in (by_id(tmp_path / "out.jsonl")["r0"], alone["r0"])]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("content", "template", "wanted"),
    [
        (("What?",), "{prompt} Long.", ("What? Long.",)),
        (("P", "What?"), "Look: {prompt}\nLong.", ("P", "Look: What?\nLong.")),
        (("Say it.", "P"), "{prompt} Long.", ("Say it.", "P", "Long.")),
        (("P",), "Describe. {prompt} Long.", ("P", "Describe. Long.")),
        (("P",), "{prompt} Long.", ("P", "Long.")),
        (("P", "a", "P", "b"), "<{prompt}>", ("P", "<a", "P", "b>")),
        (("P", "What?"), "{prompt}", ("P", "What?")),
    ],
)
def test_templates(content, template, wanted):
    picture = tiny.picture()
    swap = lambda parts: tuple(picture if part == "P" else part for part in parts)  # noqa: E731
    assert put(Message("user", swap(content)), template).content == swap(wanted)


def test_system_turns_and_choice_of_template():
    said = Conversation((Message("system", ("Old.",)), *(Message("user", (f"{n}",)) for n in range(3))))
    head, questions = Asking().questions("a", said)
    assert (head.messages, len(questions)) == ((Message("system", ("Old.",)),), 3)
    head, questions = Asking(system="New.", turns=2).questions("a", said)
    assert (head.messages, len(questions)) == ((Message("system", ("New.",)),), 2)
    choice = Asking(templates=("{prompt} A", "{prompt} B"))
    ends = {name: choice.questions(name, said)[1][0].content[0][-1] for name in map(str, range(30))}
    assert set(ends.values()) == {"A", "B"}
    with pytest.raises(UserError, match="no message of the user"):
        Asking().questions("a", Conversation((Message("assistant", ("Hi",)),)))


@pytest.mark.parametrize(
    ("wrong", "phrase"),
    [
        ({"templates": ()}, "at least one"),
        ({"templates": ("no place",)}, "exactly once"),
        ({"templates": ("{prompt}{prompt}",)}, "exactly once"),
        ({"turns": 0}, "turns must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_settings_are_checked(wrong, phrase):
    with pytest.raises(UserError, match=phrase):
        Asking(**wrong)


def test_the_shipped_recipe():
    asking = load(Asking, ROOT / "recipes/respond/long.yaml")
    assert asking == Asking(templates=("{prompt} Please answer with at least 1000 words.",), turns=1)
    with pytest.raises(UserError, match="did you mean"):
        load(Asking, ROOT / "recipes/respond/long.yaml", ["template=x"])


# --- the same rows, however they come about


@pytest.mark.parametrize("drafter", ["none", "lookup", "eagle"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_neither_slots_nor_drafter_matter(alone, folder, target, drafter, slots):
    guesser = {"none": None, "lookup": LookupDrafter(), "eagle": oracle.random_eagle(FAMILY)}[drafter]
    out = folder / f"{drafter}{slots}.jsonl"
    outcome = answer(JsonLines([folder / "rows.jsonl"]), out, target, drafter=guesser, slots=slots)
    assert by_id(out) == alone
    assert outcome.tokens == 12 * 10
    assert outcome.finish_reasons == {"length": 10}


def test_order_does_not_matter(alone, folder, target):
    rows = list(rows_of(8))
    random.Random(0).shuffle(rows)
    out = folder / "shuffled.out.jsonl"
    answer(JsonLines([write(folder / "shuffled.jsonl", rows)]), out, target)
    assert by_id(out) == alone


def test_pictures_are_found_from_the_output(folder, target, tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    answer(JsonLines([folder / "rows.jsonl"]), out, target, limit=3)
    source = JsonLines([out])
    assert sorted(len(source[i].images) for i in range(3)) == [0, 1, 1]


# --- going on


def test_every_prefix_of_the_file_is_gone_on_from(alone, folder, target):
    """Cut after any byte, as a kill could leave it: nothing is lost, nothing is doubled."""
    whole = (folder / "alone.jsonl").read_bytes()
    rng = random.Random(1)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    out = folder / "cut.jsonl"
    for cut in [0, len(whole), ends[4], ends[4] - 1, ends[4] + 1, *(rng.randrange(len(whole)) for _ in range(5))]:
        out.write_bytes(whole[:cut])
        outcome = answer(JsonLines([folder / "rows.jsonl"]), out, target)
        kept = sum(end - 1 <= cut for end in ends)  # of a whole row, nothing but the line break may be missing
        assert (outcome.skipped, outcome.success) == (kept, 8 - kept)
        assert by_id(out) == alone


def test_a_killed_process_loses_and_doubles_nothing(folder, target, tmp_path):
    """SIGKILL at a random moment while rows are written, twice, then a run to the end."""
    model = tiny.save(FAMILY, tmp_path / "model")
    rows = write(folder / "many.jsonl", rows_of(24))
    out = tmp_path / "out.jsonl"
    words = [
        "respond",
        rows,
        "--target",
        model,
        "--out",
        out,
        "--dtype",
        "float64",
        "--slots",
        4,
        "--max-new-tokens",
        24,
    ]
    words = [str(word) for word in words]
    rng = random.Random(os.getpid())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "speculens", *words], env=environment)
    try:
        wanted, deadline = rng.randrange(1, 8), time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = out.read_bytes().count(b"\n")
    assert wanted <= kept < 24
    assert cli.main(words) == 0
    asking = Asking(max_new_tokens=24)
    answer(JsonLines([rows]), tmp_path / "whole.jsonl", target, asking, slots=2)
    strip = lambda row: {**row, "metadata": None}  # noqa: E731 - the name of the target differs
    once, resumed = by_id(tmp_path / "whole.jsonl"), by_id(out)
    assert len(resumed) == 24
    assert {k: strip(v)["messages"][-1] for k, v in once.items()} == {
        k: strip(v)["messages"][-1] for k, v in resumed.items()
    }


def test_a_finished_row_is_on_the_disk_before_the_next_step(folder, target, tmp_path):
    out = tmp_path / "out.jsonl"
    seen = []
    answer(
        JsonLines([folder / "rows.jsonl"]),
        out,
        target,
        on_row=lambda done, total: seen.append((done, total, out.read_bytes().count(b"\n"))),
    )
    assert all(done == lines for done, _, lines in seen)
    assert seen[-1][:2] == (8, 8)
    assert len({done for done, *_ in seen}) > 3


def test_an_interrupt_frees_the_slots(folder, target, tmp_path):
    engine = Engine(target, slots=2, capacity=256)
    with pytest.raises(KeyboardInterrupt):
        Responder(engine, JsonLines([folder / "rows.jsonl"]), ASKING, tmp_path / "out.jsonl", "tiny").run(
            on_row=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
    assert not engine.running


def test_other_settings_do_not_mix(folder, target, tmp_path):
    source, out = JsonLines([folder / "rows.jsonl"]), tmp_path / "out.jsonl"
    answer(source, out, target, limit=2)
    for changed in (replace(ASKING, seed=4), replace(ASKING, system="Hi"), replace(ASKING, temperature=0.5)):
        with pytest.raises(UserError, match="other settings"):
            answer(source, out, target, changed)
    for loaded in ({"revision": "v2"}, {"dtype": "bfloat16"}):
        responder = Responder(Engine(target, capacity=256), source, ASKING, out, "tiny", loaded=loaded)
        with pytest.raises(UserError, match="other settings"):
            responder.run()
    assert answer(source, out, target, limit=3).skipped == 2


def test_files_of_a_default_target_from_before_its_revision_counted_are_gone_on_with():
    assert Asking().fingerprint("tiny") == "3cc55ef5d76f"


def test_what_a_drafter_noted_is_counted(folder, target, tmp_path, monkeypatch):
    """A list of it would grow with every picture."""
    begin = lookup._LookupSession.begin
    note = lambda *rows: begin(*rows) or Prefilled(0, {"operator": ["prune", "none"]})  # noqa: E731
    monkeypatch.setattr(lookup._LookupSession, "begin", note)
    source = JsonLines([folder / "rows.jsonl"])
    outcome = answer(source, tmp_path / "out.jsonl", target, drafter=LookupDrafter(), limit=3)
    assert outcome.to_dict()["stats"]["drafter_notes"] == {"operator": {"prune": 4, "none": 4}}


# --- the file


def test_a_journal_mends_only_its_end(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = b'{"id": 1}\n'
    for kept in (b"", good, good[:-1]):  # a whole row stays, also one whose line break is missing
        for torn in (b"", b'{"id": 2', b'{"id": "\xc3', b"{", *([b"\0\0\0\n"] if kept else [])):
            file.write_bytes(good * (kept != b"" and torn != b"") + (torn or kept))
            with Journal(file) as journal:
                assert (len(journal), 1 in journal, 2 in journal) == (bool(kept), bool(kept), False)
                journal.add({"id": 2, "text": "é\ud800"})
            assert [row["id"] for row in read(file)] == [1, 2][not kept :]


@pytest.mark.parametrize(
    "text",
    [
        '{"precious": 1}',
        '{"precious": ',
        "precious",
        "{\n",
        "[",
        '[\n{"id": 1}\n]\n',
        'not json\n{"id": 1}\n',
        '{"id": 1}\n{}\n',
        '{"id": 1}\n{}',
        '{"id": 1}\n[]\n',
        '{"id": 1}\n{"id": \n{"id": 2}\n',
        f'{{"id": {"[" * 200_000}{"]" * 200_000}}}\n{{"id": 1}}\n',
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(text, tmp_path):
    file = tmp_path / "mine"
    file.write_text(text)
    with pytest.raises(UserError, match=r"Line \d of .*mine is no row of an earlier run: choose another output"):
        Journal(file)
    assert file.read_text() == text


def test_rows_of_somebody_else_are_refused_and_stay(folder, target, tmp_path):
    """Their ids make them look like ours; what our own say beside is missing. The last one lacks its line break."""
    text = "\n".join(json.dumps(row) for row in rows_of(2))
    source, out, errors = JsonLines([folder / "rows.jsonl"]), tmp_path / "out.jsonl", tmp_path / "out_error.jsonl"
    out.write_text(text)
    with pytest.raises(UserError, match=r"Row 'r0' of .* was answered by another target"):
        answer(source, out, target)
    errors.write_text(out.read_text())
    out.unlink()
    with pytest.raises(UserError, match="Row 'r0' of the error file beside the output is no refusal"):
        answer(source, out, target, retry_errors=True)
    assert errors.read_text() == text


def test_the_input_is_never_the_output(tmp_path, capsys):
    """Said before the target is looked for."""
    rows = write(tmp_path / "a_error.jsonl", rows_of(2))
    (tmp_path / "link.jsonl").symlink_to(rows)
    text = rows.read_text()
    for out in (rows, tmp_path / "sub" / ".." / "a_error.jsonl", tmp_path / "link.jsonl", tmp_path / "a.jsonl"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        for command in (["respond", "--target", "nowhere"], ["prepare-data", "--overwrite"]):
            assert cli.main([command[0], str(rows), "--out", str(out), *command[1:]]) == 2
            assert "would be written over: choose another output" in capsys.readouterr().err
    assert rows.read_text() == text


def test_only_one_process_writes(tmp_path):
    with Journal(tmp_path / "rows.jsonl"), pytest.raises(UserError, match="Another process"):
        Journal(tmp_path / "rows.jsonl")
    Journal(tmp_path / "rows.jsonl").__exit__()


# --- errors


BAD = [
    {"id": "gone", "image": "gone.png", "turns": ["What?"]},
    {"id": "long", "turns": ["many words " * 200]},
    {"id": "long later", "turns": ["Hi.", "many words " * 200]},
    {"id": "mute", "messages": [{"role": "assistant", "content": "Hi"}]},
    '{"id": "torn"',
]


def test_failures_are_named_kept_and_tried_again_on_demand(alone, folder, target, tmp_path):
    rows = write(folder / "bad.jsonl", [*BAD, *rows_of(2)])
    source, out, errors = JsonLines([rows]), tmp_path / "out.jsonl", tmp_path / "out_error.jsonl"
    first = answer(source, out, target)
    assert (first.success, first.error, first.skipped) == (2, 5, 0)
    assert set(by_id(errors)) == {"gone", "long", "long later", "mute", "row-5"}
    assert sorted(first.to_dict()["reasons"].values()) == [1, 1, 1, 2]
    again = answer(source, out, target)
    assert (again.success, again.error, again.skipped) == (0, 0, 7)
    tiny.picture().save(folder / "gone.png")
    retried = answer(source, out, target, retry_errors=True)
    (folder / "gone.png").unlink()
    assert (retried.success, retried.error, retried.skipped) == (1, 4, 2)
    assert set(by_id(errors)) == {"long", "long later", "mute", "row-5"}
    assert set(by_id(out)) == {"gone", "r0", "r1"}
    assert by_id(out)["r1"] == {**alone["r1"], "messages": by_id(out)["r1"]["messages"]}
    larger = answer(source, out, target, retry_errors=True, capacity=4096)
    assert (larger.success, larger.error) == (2, 2)


def test_an_empty_answer_is_an_error(folder, target, tmp_path):
    """The end of text as the first token; also a row that ends in the moment of its admission."""
    source = JsonLines([folder / "rows.jsonl"])
    ends = Target(target.model, target.processor)
    first = answer(source, tmp_path / "one.jsonl", target, replace(ASKING, max_new_tokens=1), limit=2)
    assert first.success + first.error == 2
    type_ = type("Ending", (Target,), {"eos_token_ids": property(lambda self: frozenset(range(self.vocab_size)))})
    ends.__class__ = type_
    outcome = answer(source, tmp_path / "out.jsonl", ends, slots=2)
    assert outcome.finish_reasons["stop"] >= 8
    for row in by_id(tmp_path / "out.jsonl").values():
        assert row["metadata"]["finish_reason"] == "stop"
        assert row["messages"][-1]["content"]


# --- the command


def test_the_command(folder, tmp_path, capsys):
    model = str(tiny.save(FAMILY, tmp_path / "model"))
    save_drafter(oracle.random_eagle(FAMILY), tmp_path / "eagle")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('templates: ["{prompt} Shortly."]\nturns: 1\nmax_new_tokens: 9\n')
    rows = write(folder / "mixed.jsonl", [BAD[0], *rows_of(3)])
    words = ["respond", str(rows), "--target", model, "--dtype", "float64", "-c", str(recipe), "--system", "Be kind."]
    out = tmp_path / "out.jsonl"
    capsys.readouterr()  # saving a model shows a bar, unless an earlier test has hushed it
    assert cli.main([*words, "--out", str(out), "--seed", "5"]) == 0
    shown = capsys.readouterr()
    assert "answered" in shown.out and "1  Cannot use" in shown.out
    assert shown.err.startswith("Which rows failed, and why: ")
    assert len(shown.err.splitlines()) == 1
    made = by_id(out)
    assert made["r0"]["messages"][:2] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Question 0? Shortly."},
    ]
    assert len(made["r1"]["messages"]) == 3

    fast = tmp_path / "fast.jsonl"
    options = ["--drafter", str(tmp_path / "eagle"), "--seed", "5", "--json", "--slots", "2"]
    assert cli.main([*words, "--out", str(fast), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["success"], said["error"], said["skipped"], said["tokens"]) == (3, 1, 0, 27)
    assert said["stats"]["num_drafts"] > 0
    assert by_id(fast) == made
    assert cli.main([*words, "--out", str(fast), *options]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 4
    for other in (["--dtype", "float32"], ["--revision", "v2"]):
        assert cli.main([*words, "--out", str(fast), *options, *other]) == 2
        assert "other settings" in capsys.readouterr().err

    suffix = ["--instruction-suffix", "At length.", "--max-new-tokens", "4", "--out", str(tmp_path / "long.jsonl")]
    assert cli.main([*words, *suffix]) == 0
    assert by_id(tmp_path / "long.jsonl")["r0"]["messages"][1]["content"] == "Question 0? At length."
    capsys.readouterr()
    bad = write(folder / "only.jsonl", BAD[:1])
    assert cli.main(["respond", str(bad), "--target", model, "--out", str(tmp_path / "bad.jsonl")]) == 2
    assert "None of the 1 rows could be answered. The first: " in capsys.readouterr().err
