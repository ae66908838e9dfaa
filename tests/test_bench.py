"""Measuring: what a run records, how it goes on after a kill, what its figures mean, and what it draws."""

import builtins
import importlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import oracle
import tiny
from speculens import Conversation, Engine, Sampling, UserError, cli
from speculens.answer import Answer, ask
from speculens.bench import figures, measure, peers, plots, report, suites, tables
from speculens.bench.measure import Bench, Contender, gap, walk
from speculens.bench.record import NONE, Record, RunFolder, read_closer, read_records
from speculens.checkpoints import save_drafter
from speculens.data.respond import Asking
from speculens.drafters import LookupDrafter, lookup
from speculens.drafters.base import Prefilled
from speculens.slot import Generation, Step
from speculens.stats import Stats
from speculens.targets import Target
from speculens.text import spell
from speculens.tree import DraftTree

TOKENS = 6


@pytest.fixture(scope="module")
def target():
    return Target(tiny.model("llava"), tiny.processor("llava"))


@pytest.fixture(scope="module")
def drafters():
    return {"shelf/eagle": oracle.random_eagle("llava"), "lookup": LookupDrafter()}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Three rows; the second asks twice."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number, asked in enumerate([["What is in the picture?"], ["What is it?", "Are you sure?"], ["Describe it."]]):
        tiny.picture(number).save(folder / f"{number}.png")
        row = {"id": f"q{number}", "image": f"{number}.png", "turns": asked, "topic": "ab"[number % 2]}
        rows.append(json.dumps(row))
    (folder / "mmspec.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def bench(target, drafters, questions):
    return Bench(
        target, drafters, suites.load_suite("mmspec", [questions]), Asking(temperature=0, max_new_tokens=TOKENS)
    )


def begin(bench, path, **options: bool):
    return RunFolder(path, bench.setting(target="tiny", suite="mmspec"), **options)


# --- measuring


def test_everybody_answers_every_turn_and_says_what_the_target_says(bench, target, tmp_path):
    bench.run(begin(bench, tmp_path / "run"))
    records = read_records(tmp_path / "run")
    assert [(record.case, record.turn, record.topic) for record in records] == [
        ("q0", 0, "a"),
        ("q1", 0, "b"),
        ("q1", 1, "b"),
        ("q2", 0, "a"),
    ]
    assert all(list(record.answers) in ([*bench.drafters], [*bench.drafters][::-1]) for record in records)
    conversation = Conversation(bench.cases[1].conversation().messages[:1])
    for record in records[1:3]:  # the second turn follows on the target's own first answer
        wanted = Engine(target, capacity=256).generate(conversation, Sampling(max_new_tokens=TOKENS))
        assert {tuple(answer.generation.tokens) for answer in record.answers.values()} == {tuple(wanted.tokens)}
        prompt = target.encode(conversation)
        assert (record.prompt_tokens, record.image_tokens) == (len(prompt), int(prompt.image.sum()))
        conversation = conversation.then("assistant", wanted.text.lstrip()).then("user", "Are you sure?")
    assert all(not record.gaps for record in records)


def test_sampled_answers_are_the_targets_too_and_every_question_has_a_seed_of_its_own(
    target, drafters, questions, tmp_path
):
    cases = [
        replace(case, row={**case.row, "turns": ["Describe it."], "image": "0.png"})
        for case in suites.load_suite("mmspec", [questions])[:2]
    ]
    bench = Bench(target, drafters, cases, Asking(temperature=1.0, max_new_tokens=TOKENS))
    bench.run(begin(bench, tmp_path))
    said = [
        {tuple(answer.generation.tokens) for answer in record.answers.values()} for record in read_records(tmp_path)
    ]
    assert [len(answers) for answers in said] == [1, 1]
    assert said[0] != said[1]


def test_what_a_drafter_noted_stays_with_its_answer(target, questions, tmp_path, monkeypatch):
    """Pooled for the bar of progress, the notes of a long run would be copied with every case."""
    first, total, pooled = lookup._LookupSession.begin, Stats.total, []
    note = lambda *rows: first(*rows) or Prefilled(0, {"operator": ["prune"]})  # noqa: E731
    monkeypatch.setattr(lookup._LookupSession, "begin", note)
    monkeypatch.setattr(Stats, "total", lambda parts: pooled.append(total(parts)) or pooled[-1])
    cases = suites.load_suite("mmspec", [questions])
    bench = Bench(target, {"lookup": LookupDrafter()}, cases, Asking(temperature=0, max_new_tokens=2), closer=0)
    bench.run(begin(bench, tmp_path))
    assert [stats.drafter_notes for stats in pooled] == [{}] * 3
    noted = [record.answers["lookup"].generation.stats.drafter_notes for record in read_records(tmp_path)]
    assert noted == [{"operator": ["prune"]}] * 4


def test_the_order_turns_round_from_case_to_case(target, questions, tmp_path):
    calls = []

    def watched(name):
        def answer(prompt, sampling):
            calls.append(name)
            return ask(Engine(target, capacity=256), prompt, sampling)

        return Contender(name, answer, loop="another")

    cases = suites.load_suite("mmspec", [questions])
    bench = Bench(target, {}, cases, Asking(temperature=0, max_new_tokens=2), others=[watched("x"), watched("y")])
    bench.run(begin(bench, tmp_path))
    assert calls[-8:] == ["y", "x", "x", "y", "x", "y", "y", "x"]  # before that, warm-up


def test_eager_steps_are_measured_where_wanted_and_named(target, questions, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(measure, "Engine", lambda *given, **options: made.append(options) or Engine(*given, **options))
    cases = suites.load_suite("mmspec", [questions])[:1]
    eager = Bench(target, {}, cases, Asking(temperature=0, max_new_tokens=TOKENS), capture="off")
    folder = begin(eager, tmp_path / "run")
    eager.run(folder)
    assert {options["capture"] for options in made} == {"off"}
    assert "; eager steps, " in tables.about(figures.conclude(folder))
    recorded = Bench(target, {}, cases, eager.asking)
    with pytest.raises(UserError, match="made with capture 'off', not 'auto'"):
        begin(recorded, tmp_path / "run", resume=True)


def test_where_answers_part_is_told_with_the_gap_of_the_targets_logits(target, questions, tmp_path):
    def liar(prompt, sampling):
        told = ask(Engine(target, capacity=256), prompt, sampling)
        tokens = [*told.generation.tokens]
        tokens[4] += 1
        return replace(told, generation=replace(told.generation, tokens=tokens))

    cases = suites.load_suite("mmspec", [questions])[:1]
    asking = Asking(temperature=0, max_new_tokens=TOKENS)
    bench = Bench(target, {}, cases, asking, others=[Contender("liar", liar, loop="another")])
    folder = begin(bench, tmp_path)
    bench.run(folder)
    (record,) = read_records(tmp_path)
    prompt = target.encode(Conversation(cases[0].conversation().messages[:1]))
    inputs = {**prompt.inputs}
    own = torch.tensor([record.answers[NONE].generation.tokens[:4]])
    inputs["input_ids"] = torch.cat([prompt.inputs["input_ids"], own], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    best, second = target.model(**inputs).logits[0, -1].float().topk(2).values.tolist()
    assert record.gaps["liar"] == pytest.approx(best - second, abs=1e-5)
    summary = figures.conclude(folder)
    assert summary["drafters"]["liar"]["differences"] == [
        {"case": "q0", "turn": 0, "token": 4, "gap": record.gaps["liar"]}
    ]
    assert tables.exactness(summary)[0] == "liar: 0 of 1 answers equal the target's own"
    assert tables.exactness(summary)[1].startswith("  q0: parts at token 4, ")


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)])
@pytest.mark.parametrize("place", [0, 3])
def test_the_best_of_the_two_choices_is_what_the_target_said(target, sampling, place):
    """The gap is of the very scores that choose: taking its best token away changes the answer there, by that much."""
    prompt = target.encode(tiny.conversation("llava"))
    said = Engine(target, capacity=256).generate(prompt, replace(sampling, max_new_tokens=6)).tokens
    scores = []
    with pytest.MonkeyPatch.context() as patch:
        real = torch.Tensor.topk
        patch.setattr(torch.Tensor, "topk", lambda self, k: scores.append(self) or real(self, k))
        apart = gap(target, prompt, said[:place], sampling)
    assert int(scores[-1].argmax()) == said[place]
    assert apart > 0


def test_a_peer_that_fails_takes_nothing_from_the_others(target, questions, tmp_path):
    def fail(*_: object):
        raise UserError("It cannot.")

    cases = suites.load_suite("mmspec", [questions])[:1]
    bench = Bench(
        target, {}, cases, Asking(temperature=0, max_new_tokens=4), others=[Contender("peer", fail, "another")]
    )
    folder = begin(bench, tmp_path)
    bench.run(folder)
    summary = figures.conclude(folder)
    assert summary["drafters"]["peer"]["failures"] == {"It cannot.": 1}
    assert summary["drafters"]["peer"]["all"] is None
    assert summary["drafters"][NONE]["all"]["questions"] == 1
    assert tables.failures(summary) == ["peer could not answer 1: It cannot."]


def test_a_bad_picture_costs_its_own_case_only(target, questions, tmp_path):
    lines = (questions / "mmspec.jsonl").read_text().splitlines()
    for picture in questions.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes() if picture.stem != "0" else b"no picture")
    (tmp_path / "mmspec.jsonl").write_text("\n".join(lines))
    bench = Bench(target, {}, suites.load_suite("mmspec", [tmp_path]), Asking(temperature=0, max_new_tokens=2))
    folder = begin(bench, tmp_path / "run")
    bench.run(folder)
    summary = figures.conclude(folder, bench.errors)
    assert [*summary["errors"]] == ["q0"]
    assert summary["cases"] == 2


def test_a_case_without_room_is_refused_with_both_numbers(target, questions, tmp_path):
    cases = suites.load_suite("mmspec", [questions])[:1]
    bench = Bench(target, {}, cases, Asking(temperature=0, max_new_tokens=2), capacity=8)
    bench.run(begin(bench, tmp_path))
    assert re.search(r"q0 may need \d+ rows.* room for 8", bench.errors["q0"])


def test_the_closer_look_is_at_so_many_cases_and_may_be_left_out(target, questions, tmp_path):
    cases, costs = suites.load_suite("mmspec", [questions])[::2], {}
    for closer in (0, 1):
        asking = Asking(temperature=0, max_new_tokens=4)
        bench = Bench(target, {"lookup": LookupDrafter()}, cases, asking, closer=closer)
        folder = begin(bench, tmp_path / f"{closer}")
        bench.run(folder)
        assert folder.has("closer") == bool(closer)
        summary = figures.conclude(folder)
        costs[closer] = [about["all"].get("costs", {}).get("answers") for about in summary["drafters"].values()]
    assert costs == {0: [None] * 2, 1: [1] * 2}
    without, near = (report.read_run(tmp_path / f"{closer}") for closer in (0, 1))
    assert {row[6] for row in tables.pass_rows(without.summary)} == {tables.UNKNOWN}
    drawn = [[plot.name for plot in plots.plots(run.summary, run.records)] for run in (without, near)]
    assert {*drawn[1]} - {*drawn[0]} == {"cost-split"}
    pages = [report.render([run], [[]]) for run in (without, near)]
    assert ["step by step" in page for page in pages] == [False, True]
    bench.run(begin(bench, tmp_path / "0", resume=True))
    assert read_closer(tmp_path / "0")["costs"]["lookup"]["answers"] == 1, "a run may have it later"


# --- going on


class KillError(Exception):
    pass


def test_a_killed_run_goes_on_and_measures_no_case_twice(bench, tmp_path):
    def kill(progress):
        if progress.done == 2:
            raise KillError

    with pytest.raises(KillError):
        bench.run(begin(bench, tmp_path / "run"), kill)
    file = tmp_path / "run" / "records.jsonl"
    before = file.read_bytes()
    with file.open("ab") as records:
        records.write(b'{"id": "q2", "number": 2, "tur')  # the line that was under way
    seen = []
    bench.run(
        begin(bench, tmp_path / "run", resume=True), lambda progress: seen.append((progress.done, progress.total))
    )
    assert seen == [(2, 3), (3, 3)]
    assert file.read_bytes().startswith(before)
    assert [record.case for record in read_records(tmp_path / "run")] == ["q0", "q1", "q1", "q2"]


def test_a_run_is_gone_on_with_under_its_own_setting_only(bench, target, drafters, tmp_path):
    begin(bench, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run already: go on with it by --resume"):
        begin(bench, tmp_path / "run")
    other = Bench(target, drafters, bench.cases, Asking(temperature=0, max_new_tokens=TOKENS + 1))
    with pytest.raises(UserError, match=r"made with asking\.max_new_tokens 6, not 7"):
        begin(other, tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    with pytest.raises(UserError, match="holds something else than a run"):
        begin(bench, tmp_path / "other", resume=True)


# --- figures


def answered(tokens, seconds, first=0.0, accepted=0):
    """`accepted` drafted tokens are kept in every pass but, as may be, the last."""
    stats, left = Stats(), tokens - 1
    while left:
        now = min(accepted + 1, left)
        stats.add_pass(now, min(accepted, now), 2 * accepted)
        left -= now
    return Answer(Generation([*range(tokens)], "", "stop", stats), (), seconds, first)


def record(case, topic, own, mine, turn=0):
    return Record(case, topic, turn, 20, 4, {NONE: own, "x": mine})


RECORDS = [
    record("p", "a", answered(9, 8.0, 2.0), answered(9, 4.0, 2.0, accepted=3)),
    record("q", "b", answered(5, 4.0, 1.0), answered(5, 4.0, 1.0, accepted=1)),
    record("q", "b", answered(5, 6.0, 1.0), answered(5, 2.0, 1.0, accepted=1), turn=1),
]


def test_figures_by_hand():
    got = figures.figures("x", RECORDS)
    assert got["walltime_speedup"] == 18 / 10
    assert got["walltime_speedup_median"] == 2
    assert got["walltime_speedup_quartiles"] == [1.5, 2.5]
    assert got["decode_speedup"] == 14 / 6
    assert got["mean_acceptance_length"] == 16 / 6  # 8 tokens in 2 passes, 4 in 2, 4 in 2
    assert got["mean_accepted_tokens"] == (6 + 2 + 2) / 6
    assert got["acceptance_rate_per_position"] == [1, 2 / 6, 2 / 6]
    assert got["efficiency"] == pytest.approx(1.8 / (16 / 6))
    assert got["seconds_per_pass"] == 1
    assert got["time_to_first_token"] == 1
    assert got["tokens_per_second"] == 1.9
    assert got["exact"] == 1
    assert "draft_time_fraction" not in got  # nobody waited for the device


def test_an_interval_holds_the_figure_is_seeded_and_draws_whole_conversations():
    got = figures.figures("x", RECORDS)
    low, high = got["walltime_speedup_interval"]
    assert low < got["walltime_speedup"] < high
    assert got == figures.figures("x", RECORDS)
    # Two conversations: their speedups 8/4 and 10/6 are the extremes, whatever the turns within.
    assert (low, high) == (pytest.approx(10 / 6), pytest.approx(2))
    assert figures.figures("x", RECORDS[:1])["walltime_speedup_interval"] is None


def test_a_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        below = rng.uniform(1, 2, 40)
        low, high = figures.bootstrap(below * rng.normal(1.5, 0.3, 40), below)
        hits += low <= 1.5 <= high
    assert 0.88 <= hits / 200 <= 0.99


# --- one prompt, step by step


@pytest.mark.parametrize("name", ["shelf/eagle", "lookup"])
def test_a_walk_tells_the_trees_and_the_way_through_them(target, drafters, name):
    prompt = target.encode(tiny.conversation("llava"))
    sampling = Sampling(max_new_tokens=TOKENS)
    steps = walk(Engine(target, drafters[name], capacity=128), prompt, sampling)
    said = Engine(target, capacity=128).generate(prompt, sampling)
    spelt = [spell(target.tokenizer, token)[0] for token in said.tokens]
    assert [token for step in steps for token in step["tokens"]] == spelt
    root = steps[0]["tokens"][-1]
    for step in steps[1:]:
        assert step["nodes"][0] == root
        assert [step["nodes"][node] for node in step["path"][1:]] == step["tokens"][: step["accepted"]]
        assert all(
            step["parents"][below] == above for above, below in zip(step["path"], step["path"][1:], strict=False)
        )
        root = step["tokens"][-1]


def test_a_walk_spells_tokens_with_their_spaces():
    words = tiny.pieces(leading_space=True)
    *_, letter, world = words.encode("a world", add_special_tokens=False)
    step = Step(None, [world, letter], "", 1, DraftTree.chain(torch.tensor([[letter, world]])))
    engine = SimpleNamespace(target=SimpleNamespace(tokenizer=words), stream=lambda *_: [step])
    (told,) = walk(engine, None, None)
    assert told == {
        "tokens": [" world", "a"],
        "accepted": 1,
        "nodes": ["a", " world"],
        "parents": [0, 0],
        "path": [0, 1],
    }


# --- suites


def picture(file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (28, 28)).save(file)


def lines(rows):
    return "\n".join(map(json.dumps, rows))


EXPLAIN = "Please answer with an explanation."
LAYOUTS = {
    "scienceqa": (
        {
            "problems.json": {
                "1": {
                    "question": "Which?",
                    "choices": ["red", "blue"],
                    "hint": "Look.",
                    "image": "image.png",
                    "subject": "art",
                    "split": "test",
                },
                "2": {"question": "What?", "choices": ["x"], "hint": "", "image": None, "subject": "art"},
            },
            "pid_splits.json": {"train": [], "test": ["2", "1"]},
        },
        ["images/test/1/image.png"],
        (
            "Context: Look.\nQuestion: Which?\nOptions: (A) red (B) blue\n"
            'Your answer should begin with "The answer is". Please answer with an explanation. Answer:'
        ),
    ),
    "mm-vet": (
        {"mm-vet.json": {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "capability": ["ocr", "math"]}}},
        ["images/v1_0.png"],
        ("What is x?", EXPLAIN),
    ),
    "textvqa": (
        {"TextVQA_0.5.1_val.json": {"data": [{"question": "Brand?", "question_id": 7, "image_id": "ab"}]}},
        ["train_images/ab.jpg"],
        ("Brand?", suites.suites()["textvqa"]["prompt"][1]),
    ),
    "mme": (
        {
            "llava_mme.jsonl": [
                {"question_id": "a/1.png", "image": "a/1.png", "text": "Cat?\nYes or no.", "category": "a"}
            ]
        },
        ["MME_Benchmark_release_version/MME_Benchmark/a/1.png"],
        ("Cat?", EXPLAIN),
    ),
    "coco": (
        {
            "dataset_coco.json": {
                "images": [
                    {"imgid": 1, "split": "train", "filepath": "val2014", "filename": "1.jpg"},
                    {"imgid": 2, "split": "test", "filepath": "val2014", "filename": "2.jpg"},
                    {"imgid": 2, "split": "test", "filepath": "val2014", "filename": "2.jpg"},
                ]
            }
        },
        ["val2014/2.jpg"],
        "Please provide a detailed description of the given image.",
    ),
    "vizwiz": (
        {"test.json": [{"image": "V_1.jpg", "question": "What is this?"}]},
        ["test/V_1.jpg"],
        ("What is this?", EXPLAIN),
    ),
    "gqa": (
        {"llava_gqa_testdev_balanced.jsonl": [{"question_id": "9", "image": "n1.jpg", "text": "Left?\nOne word."}]},
        ["images/n1.jpg"],
        ("Left?", EXPLAIN),
    ),
    "seed-bench": (
        {
            "llava-seed-bench.jsonl": [
                {"question_id": "v", "image": "SEED-Bench-video-image/1.png", "text": "Moves?"},
                {"question_id": "i", "image": "SEED-Bench-image/2", "text": "Where?\nA. here"},
            ]
        },
        ["SEED-Bench-image/2"],
        ("Where?", EXPLAIN),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_is_read_as_it_lies(name, tmp_path):
    files, pictures, prompt = LAYOUTS[name]
    for file, content in files.items():
        (tmp_path / file).write_text(lines(content) if file.endswith("jsonl") else json.dumps(content))
    for file in pictures:
        picture(tmp_path / file if Path(file).suffix else tmp_path / f"{file}.png")
        if not Path(file).suffix:
            (tmp_path / f"{file}.png").rename(tmp_path / file)
    (case,) = suites.load_suite(name, [tmp_path])
    system, question = case.conversation().messages
    assert system.role == "system" and system.content[0].startswith("A chat between a curious human and")
    *texts, shown = question.content  # the paper's code puts the picture behind the text
    assert (texts, shown.size) == ([prompt] if isinstance(prompt, str) else [*prompt], (28, 28))


@pytest.mark.parametrize("name", [*LAYOUTS, "mmspec", "jsonl"])
def test_a_missing_data_set_says_what_to_fetch(name, tmp_path):
    for data in ([], [tmp_path]):
        with pytest.raises(UserError) as caught:
            suites.load_suite(name, data)
        assert suites.suites()[name]["fetch"] in str(caught.value)


def test_the_eight_are_there_and_every_suite_says_what_it_is():
    assert [*LAYOUTS] == [*suites.suites()][3:]
    for about in suites.suites().values():
        assert {"about", "licence", "fetch"} <= about.keys()
    with pytest.raises(UserError, match="There is no suite 'coca': known are testbed, "):
        suites.load_suite("coca")


def test_samples_are_drawn_as_the_papers_code_draws(tmp_path):
    rows = [{"image": f"{number}.jpg", "question": "?"} for number in range(150)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    order = np.random.default_rng(42).permutation(150)[:100]  # what the hub's shuffle(seed=42) does
    assert [case.name for case in suites.load_suite("vizwiz", [tmp_path])] == [f"{number}.jpg" for number in order]


def test_solved_examples_are_drawn_behind_the_sample_and_stand_before_every_question(science):
    folder, splits = science
    pictured = {split: [key for key in keys if int(key) % 3] for split, keys in splits.items()}
    random.seed(42)  # as the paper's code does: one generator, the sample first
    asked, solved = random.sample(pictured["test"], 100), random.sample(pictured["train"], 3)
    cases = suites.load_suite("scienceqa", [folder])
    assert [case.name for case in cases] == asked
    wanted = []
    for key in solved:
        context = "N/A" if int(key) % 2 else "Look at it."
        text = f"Context: {context}\nQuestion: Which {key}?\nOptions: (A) red (B) blue (C) green\nAnswer:"
        wanted += [("user", text), ("assistant", f"The answer is {'ABC'[int(key) % 3]}.")]
    for case in (cases[0], cases[99]):
        system, *examples, question = case.row["messages"]
        assert [
            (one["role"], one["content"][0]["text"] if number % 2 == 0 else one["content"])
            for number, one in enumerate(examples)
        ] == wanted
        assert [one["content"][1]["path"] for one in examples[::2]] == [
            f"images/train/{key}/image.png" for key in solved
        ]
        assert question["content"][1]["path"] == f"images/test/{case.name}/image.png"
        assert question["content"][0]["text"].startswith("Context: ")
        for path in (one["content"][1]["path"] for one in [*examples[::2], question]):
            picture(folder / path)
        before, questions = Asking().questions(case.name, case.conversation(), case.given)
        assert [message.role for message in before.messages] == ["system", *["user", "assistant"] * 3]
        assert [message.content[0] for message in before.messages] == [system["content"], *(text for _, text in wanted)]
        assert [message.content[0] for message in questions] == [question["content"][0]["text"]]
    assert {case.given for case in cases} == {7}


def test_a_split_that_is_missing_is_named(science):
    folder, splits = science
    (folder / "pid_splits.json").write_text(json.dumps({"test": splits["test"]}))
    with pytest.raises(UserError, match="has no 'train', so it is not the file that scienceqa needs"):
        suites.load_suite("scienceqa", [folder])


PROBLEM = LAYOUTS["scienceqa"][0]["problems.json"]["1"]


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        ("textvqa", {"TextVQA_0.5.1_val.json": {"rows": []}}, "TextVQA_0.5.1_val.json has no 'data'"),
        ("textvqa", {"TextVQA_0.5.1_val.json": [1]}, "TextVQA_0.5.1_val.json has no 'data'"),
        ("textvqa", {"TextVQA_0.5.1_val.json": {"data": 3}}, "TextVQA_0.5.1_val.json holds no list"),
        ("textvqa", {"TextVQA_0.5.1_val.json": {"data": ["row"]}}, "Row 1 of .*_val.json is no object"),
        ("mm-vet", {"mm-vet.json": {"v1": [1]}}, "Row 1 of .*mm-vet.json is no object"),
        ("mm-vet", {"mm-vet.json": {"v1": {"imagename": "a.png"}}}, "Row 1 of .*mm-vet.json has no 'capability'"),
        ("mm-vet", {"mm-vet.json": {"v1": {"imagename": "a.png", "capability": 1}}}, "Row 1 .* of another kind"),
        ("mme", {"llava_mme.jsonl": [[1, 2]]}, "Row 1 of .*llava_mme.jsonl is no object"),
        ("coco", {"dataset_coco.json": {"images": [{"split": "test", "imgid": [1]}]}}, "Row 1 .* of another kind"),
        (
            "scienceqa",
            {"problems.json": {"1": PROBLEM}, "pid_splits.json": {"test": ["1", "2"], "train": []}},
            "problems.json has no '2'",
        ),
        (
            "scienceqa",
            {"problems.json": {"1": PROBLEM}, "pid_splits.json": {"test": {"1": 0}, "train": []}},
            "pid_splits.json holds no list",
        ),
        *(
            (
                "scienceqa",
                {
                    "problems.json": {"1": {**PROBLEM, "answer": answer}},
                    "pid_splits.json": {"test": ["1"], "train": ["1"]},
                },
                "Row 1 of .*problems.json has a field of another kind",
            )
            for answer in ("0", 10**7, 10**30)
        ),
    ],
)
def test_a_file_of_another_form_is_refused_in_a_sentence(name, files, sentence, tmp_path):
    for file, content in files.items():
        (tmp_path / file).write_text(lines(content) if file.endswith("jsonl") else json.dumps(content))
    with pytest.raises(UserError, match=f"{sentence}.*, so it is not the file that {name} needs"):
        suites.load_suite(name, [tmp_path])


@pytest.fixture
def science(tmp_path):
    """A folder of ScienceQA's layout, every third problem without a picture, and its splits."""
    splits = {"train": [str(number) for number in range(300, 900)], "test": [str(number) for number in range(270)]}
    problems = {
        key: {
            "question": f"Which  {key}?",
            "choices": ["red", "blue", "green"],
            "answer": int(key) % 3,
            "hint": "" if int(key) % 2 else "Look at  it. ",
            "image": "image.png" if int(key) % 3 else None,
            "subject": "x",
            "split": split,
        }
        for split, keys in splits.items()
        for key in keys
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    return tmp_path, splits


def test_the_testbed_is_found_in_a_checkout_and_files_are_taken_in_turn():
    cases = suites.load_suite("testbed")
    assert [case.topic for case in cases[:4]] == ["charts", "openstax"] * 2
    assert cases[0].conversation().images


# --- peers


@pytest.mark.parametrize("name", ["hf", "hf:lookup"])
def test_a_peer_answers_as_the_target_does(target, name):
    prompt = target.encode(tiny.conversation("llava"))
    sampling = Sampling(max_new_tokens=24)
    got = peers.load_peer(name, target, 0).answer(prompt, sampling)
    wanted = Engine(target, capacity=128).generate(prompt, sampling)
    assert got.generation.tokens == wanted.tokens
    assert got.generation.stats.num_tokens >= 1
    assert 0 < got.time_to_first_token < got.seconds


def test_an_assistant_is_another_model(tmp_path):
    tiny.save("llava", tmp_path)
    target = Target(tiny.model("llava"), tiny.processor("llava"))
    prompt = target.encode(tiny.conversation("llava"))
    got = peers.load_peer(f"hf:assistant={tmp_path}", target, 0).answer(prompt, Sampling(max_new_tokens=12))
    assert len(got.generation.tokens) == 12


@pytest.mark.parametrize(
    ("name", "temperature", "sentence"),
    [("hf", 0.5, "at --temperature 0 only"), ("hf:magic", 0, "no peer 'hf:magic'"), ("hf:assistant=", 0, "no peer")],
)
def test_what_no_peer_can_do_is_refused(target, name, temperature, sentence):
    with pytest.raises(UserError, match=sentence):
        peers.load_peer(name, target, temperature)


# --- the command line, and the page


@pytest.fixture(scope="module")
def measured(questions, tmp_path_factory):
    """A run by the command line."""
    shelf = tmp_path_factory.mktemp("shelf")
    tiny.save("llava", shelf / "llava")
    save_drafter(oracle.random_eagle("llava"), shelf / "eagle")
    words = ["bench", "--target", shelf / "llava", "--drafter", shelf / "eagle", "none", "lookup", "hf"]
    words += ["--suite", "mmspec", "--data", questions, "--dtype", "float64", "--max-new-tokens", "6"]
    words = [str(word) for word in [*words, "--num-steps", "1", "--num-draft-tokens", "5", "--out", shelf / "run"]]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(builtins, "print", printed.append)
        assert cli.main(words) == 0
    return shelf, words


def test_bench_writes_a_run_and_says_exactness_first(measured, capsys):
    shelf, words = measured
    assert cli.main([*words, "--resume"]) == 0
    out = capsys.readouterr().out
    first, second, *_ = out.splitlines()
    assert first.startswith("llava, 4 questions of mmspec, greedy")
    assert second == "eagle: 4 of 4 answers equal the target's own"
    assert "* in a loop of its own" in out
    summary = json.loads((shelf / "run" / "summary.json").read_text())
    about = summary["drafters"][str(shelf / "eagle")]
    assert about["all"]["exact"] == 1
    assert summary["setting"]["drafters"][str(shelf / "eagle")]["tree"]["num_draft_tokens"] == 5
    assert about["all"]["num_draft_tokens"] <= 4 * about["all"]["num_drafts"]
    assert [*about["topics"]] == ["a", "b"]
    assert {*about["all"]["costs"]} >= {"vision", "prefill", "draft", "verify", "host"}
    assert about["all"]["costs"]["vision"] > 0
    assert {"drafter_prefill_ratio", "draft_time_fraction", "peak_memory"} <= about["all"].keys()


def test_bench_pins_trees_or_lets_each_step_size_them(measured, tmp_path, capsys):
    shelf, words = measured
    sized = [*words[: words.index("--num-steps")], "--tree", "auto", "--limit", "1", "--closer", "0", "--json"]
    assert cli.main([*sized, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads(capsys.readouterr().out)
    about = summary["setting"]["drafters"]
    assert about[str(shelf / "eagle")]["tree"] == about["lookup"]["tree"] == "auto"
    assert summary["drafters"][str(shelf / "eagle")]["all"]["exact"] == 1
    pinned = [word for word in sized if word not in {"--tree", "auto"}]
    assert cli.main([*pinned, "--out", str(tmp_path / "run"), "--resume"]) == 2  # another setting


def test_where_nothing_can_be_measured_there_is_a_sentence(measured, tmp_path, capsys):
    _, words = measured
    (tmp_path / "mmspec.jsonl").write_text('{"id": "lost", "image": "lost.png", "turns": ["?"]}\n')
    words = [*words, "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--closer", "0"]
    del words[words.index("--data") : words.index("--data") + 2]
    sentence = f"speculens: Nothing could be measured in {tmp_path / 'run'}: Row 'lost': "
    for again in (words, ["report", str(tmp_path / "run")]):
        assert cli.main(again) == 2
        assert " ".join(capsys.readouterr().err.split()).startswith(sentence)
    assert not (tmp_path / "run" / "closer.json").exists()


def test_a_folder_with_a_run_is_refused_before_anything_is_loaded(measured, tmp_path, monkeypatch, capsys):
    _, words = measured
    monkeypatch.setattr(importlib.import_module("speculens.cli.bench"), "load", None)
    assert cli.main(words) == 2
    assert "holds a run already" in capsys.readouterr().err
    (tmp_path / "precious.txt").touch()
    for place in (tmp_path, tmp_path / "precious.txt"):
        assert cli.main([*words, "--out", str(place)]) == 2
        assert "holds something else than a run" in capsys.readouterr().err


def test_a_report_needs_nothing_else(measured, capsys):
    shelf, _ = measured
    assert cli.main(["report", str(shelf / "run")]) == 0
    page = (shelf / "run" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)', page)
    assert "<script" not in page
    assert page.count("<figure>") == page.count("<figcaption>") == 5
    assert page.count("<details") > 2
    assert not re.search("#(2f6db3|22262b)", page.partition("</style>")[2])  # all colours follow the scheme
    pictures = sorted((shelf / "run" / "plots").iterdir())
    assert len(pictures) == 5
    for file in pictures:
        with Image.open(file) as image:
            assert image.format == "PNG"
    assert "report.html" in capsys.readouterr().out


def test_two_runs_make_one_page(measured):
    shelf, _ = measured
    run = report.read_run(shelf / "run")
    page = report.render([run, replace(run, name="<b>")], [[], []])
    assert "<h2>run</h2>" in page
    assert "<h2>&lt;b&gt;</h2>" in page


def test_without_matplotlib_or_a_run_there_is_a_sentence(measured, monkeypatch, tmp_path, capsys):
    shelf, _ = measured
    real = builtins.__import__

    def without(name, *rest: object):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["report", str(shelf / "run")]) == 2
    assert "Plots need matplotlib: install speculens with its extra plot" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no finished run: summary.json is missing" in capsys.readouterr().err


def test_what_a_model_says_is_escaped_and_a_tree_is_drawn_whole():
    drawn = report.draw_tree([" a", "<b>", "c", "d\n"], [0, 0, 0, 1], [0, 1, 3])
    assert "&lt;b&gt;" in drawn
    assert "<b>" not in drawn
    assert drawn.count("<rect") == 4
    assert drawn.count('class="on"') == 5  # three nodes and the two edges between them
