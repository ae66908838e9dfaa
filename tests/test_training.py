"""Training: recipes, answers, batches, the loop, its checkpoints. What the losses compute is in test_losses.py."""

from __future__ import annotations

import copy
import errno
import functools
import json
import multiprocessing
import os
import select
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from testbed import train_drafters

import tiny
from speculens.checkpoints import load_drafter, save_drafter, whole
from speculens.conversation import Conversation, Message
from speculens.data.sources import PICTURE, JsonLines, Listed
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets import Target, processing
from speculens.targets.processing import described
from speculens.training import Recipe, checkpoint, encode, load_recipe, train
from speculens.training.batches import Encoder, Order, attempt, collate, stream, trains
from speculens.training.config import Optimiser, read_recipe
from speculens.training.encoded import AHEAD, _made, encoded
from speculens.training.measure import exam
from speculens.training.student import make_drafter
from speculens.training.trainer import factor

ROOT = Path(__file__).parents[1]
FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
SHAPE = {"num_steps": 3, "topk": 4, "num_draft_tokens": 12}


@functools.cache
def target(family: str, dtype: torch.dtype = torch.float32) -> Target:
    return Target(tiny.model(family, dtype), tiny.processor(family))


@functools.cache
def speaker(family: str) -> Target:
    """A target whose every text is encoded to the tokens it was made of: it knows whole words with a space in front."""
    model, words = copy.deepcopy(tiny.model(family, torch.float32)), tiny.tokenizer(family)
    texts = [words.decode([token]) for token in range(len(words))]
    spoken = [i for i, text in enumerate(texts) if text.startswith(" ") and text[1:].isalpha()]
    head = torch.nn.Linear(tiny.HIDDEN, len(words), bias=False).requires_grad_(False)
    head.weight.zero_()[spoken] = model.get_output_embeddings().weight[spoken]
    model.set_output_embeddings(head)
    return Target(model, tiny.processor(family))


@functools.cache
def answered(family: str, count: int = 3, tokens: int = 16) -> tuple[Conversation, ...]:
    """Conversations with the speaker's own answers."""
    asked = [tiny.conversation(family, seed=seed) for seed in range(count)]
    answers = Engine(speaker(family), slots=count, capacity=256).generate_all(asked, Sampling(max_new_tokens=tokens))
    return tuple(one.then("assistant", answer.text.strip()) for one, answer in zip(asked, answers, strict=True))


def recipe(output: Path, **changes: Any) -> Recipe:
    values = {
        "target": "tiny",
        "drafter": {"method": "eaglevlm", "tree": SHAPE},
        "output": str(output),
        "optimiser": {"lr": 5e-3, "warmup": 3, "schedule": "cosine"},
        "batch_size": 3,
        "steps": 8,
        "dtype": "float32",
        "workers": 0,
        "log_every": 1,
        "save_every": None,
        "eval_every": None,
        "eval_tokens": 16,
    }
    return read_recipe(values | changes)


def events_of(output: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


# --- the recipe


def test_the_shipped_recipes_are_complete():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert read_recipe(yaml.safe_load(load_recipe(path).to_yaml())) == load_recipe(path)


RUNS = {run.folder: run for part in ("shipped", "ablations") for run in train_drafters.runs(part, ["llava"])}


@pytest.mark.parametrize("name", RUNS)
def test_every_planned_run_is_a_recipe_that_makes_a_drafter(name, tmp_path):
    """Its change is of something that the recipe says or that has a default, and the saved drafter knows it."""
    run = RUNS[name]
    assert run.after is None or f"llava-{run.after}" in RUNS
    path = ROOT / f"recipes/testbed/{run.recipe}.yaml"
    usual, made = (load_recipe(path, ["drafter.init_from=null", *more]) for more in ([], run.set))
    assert (made == usual) == (not run.set)
    drafter = make_drafter(made.drafter, speaker("llava"))
    saved = load_drafter(save_drafter(drafter, tmp_path))
    assert saved.config == drafter.config
    assert all(saved.config.options[key] == value for key, value in made.drafter.options.items() if value != "auto")


def test_overrides_reach_every_section():
    made = load_recipe(
        ROOT / "recipes/eaglevlm.yaml",
        [
            "optimiser.lr=1e-3",
            "optimiser.betas=[0.8, 0.9]",
            "epochs=null",
            "steps=7",
            "drafter.tree.topk=3",
            "data.train=a",
        ],
    )
    assert made.optimiser.lr == 1e-3
    assert made.optimiser.betas == (0.8, 0.9)
    assert (made.steps, made.epochs) == (7, None)
    assert made.drafter.tree.topk == 3
    assert made.data.train == ("a",)
    assert made.to_dict()["drafter"]["tree"]["topk"] == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=1", "did you mean optimiser"),
        ("optimiser.lrr=1", "did you mean optimiser.lr"),
        ("drafter.tree.top_k=1", "did you mean drafter.tree.topk"),
        ("objective.soft_se=1", "did you mean objective.soft_ce"),
        ("batch_size=many", "batch_size must be a whole number, not 'many'"),
        ("batch_size=1.5", "batch_size must be a whole number"),
        ("batch_size=true", "batch_size must be a whole number"),
        ("batch_size=0", "batch_size must be above 0"),
        ("compile=1", "compile must be true or false"),
        ("optimiser.lr=fast", "optimiser.lr must be a number"),
        ("optimiser.lr=-1", "optimiser.lr must be above 0"),
        ("optimiser.betas=[0.9]", "optimiser.betas must be 2 values"),
        ("optimiser=3", "optimiser must be a section"),
        ("optimiser.schedule=cosin", "did you mean cosine"),
        ("drafter.method=eagle", "did you mean eaglevlm"),
        ("epochs=null", "the recipe says none"),
        ("objective={soft_ce: 0, smooth_l1: 0}", "nothing to learn"),
        ("drafter={}", "lacks drafter.method"),
        ("batch_size", "written section.key=value"),
        ("batch_size=[", "not valid YAML"),
    ],
)
def test_a_mistake_in_the_recipe_is_named(override, said):
    with pytest.raises(UserError, match="(?s)" + said):
        load_recipe(ROOT / "recipes/eaglevlm.yaml", [override])


@pytest.mark.parametrize("name", ["eaglevlm", "testbed/eaglevlm"])  # one says epochs, the other steps
@pytest.mark.parametrize("said", ["steps=5", "epochs=0.5", "minutes=2"])
def test_a_length_on_the_command_line_takes_the_place_of_the_files(name, said):
    made = load_recipe(ROOT / f"recipes/{name}.yaml", ["minutes=null", said])
    length, _, value = said.partition("=")
    expected = dict.fromkeys(("steps", "epochs", "minutes")) | {length: float(value)}
    assert {key: getattr(made, key) for key in expected} == expected


def test_two_lengths_are_refused(tmp_path):
    twice = "exactly one of steps, epochs and minutes; the recipe says "
    with pytest.raises(UserError, match=twice + "steps and minutes"):
        load_recipe(ROOT / "recipes/eaglevlm.yaml", ["steps=5", "minutes=2"])
    text = (ROOT / "recipes/eaglevlm.yaml").read_text(encoding="utf-8")
    (tmp_path / "twice.yaml").write_text(text + "\nsteps: 5\n", encoding="utf-8")
    with pytest.raises(UserError, match=twice + "steps and epochs"):
        load_recipe(tmp_path / "twice.yaml")
    assert load_recipe(tmp_path / "twice.yaml", ["steps=null"]).epochs == 1


def test_a_missing_or_broken_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="no text in UTF-8"):
        load_recipe(tmp_path / "picture.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="must be a section"):
        load_recipe(tmp_path / "list.yaml")


def test_the_rate_rises_and_falls():
    optimiser = Optimiser(warmup=4, schedule="cosine")
    assert [factor(optimiser, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(optimiser, 9, 1.0) == 0.0
    assert factor(Optimiser(schedule="linear"), 0, 0.25) == 0.75
    assert factor(Optimiser(), 0, 1.0) == 1.0


# --- answers


def talk(*texts: str, pictures: dict[int, int] | None = None) -> Conversation:
    """User and assistant in turn; `pictures` maps the number of a message to how many pictures it starts with."""
    messages = []
    for number, text in enumerate(texts):
        shown = [tiny.picture(10 * number + i) for i in range((pictures or {}).get(number, 0))]
        messages.append(Message("assistant" if number % 2 else "user", (*shown, text)))
    return Conversation(tuple(messages))


def answers(made: Target, conversation: Conversation) -> str:
    row = Encoder(made, 4096).row(conversation)
    return made.tokenizer.decode(row.inputs["input_ids"][0][row.answer])


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "gemma3", "internvl", "idefics3"])
@pytest.mark.parametrize("pictures", [{0: 1}, {0: 1, 2: 1}, {}])
def test_every_answer_trains_and_nothing_else(family, pictures):
    """With a picture in a later turn the cheap way is closed, and the answer before it must still be found."""
    row = talk("What is in the picture?", "Three bars.", "And to the left?", "A legend.", pictures=pictures)
    assert answers(target(family), row) == " Three bars.\n A legend.\n"


def test_the_cheap_way_and_the_long_way_agree(monkeypatch):
    row = talk("What is it?", "Three bars.", "And there?", "A legend.", pictures={0: 2})
    encoder = Encoder(target("llava"), 4096)
    calls = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda c, **kw: calls.append(len(c.images)) or encode(c, **kw))
    cheap = encoder.row(row).answer
    assert sorted(calls, reverse=True)[:2] == [2, 0]  # pictures were processed once
    monkeypatch.setattr("speculens.training.batches._without_pictures", lambda _: None)
    assert torch.equal(encoder.row(row).answer, cheap)


def test_an_answer_ends_with_its_end_token():
    made = Target(tiny.model("llava", torch.float32), copy.copy(tiny.processor("llava")))
    made.processor.chat_template = made.processor.chat_template.replace(
        "{{ '\\n' }}", "{% if message['role'] == 'assistant' %}</s>{% endif %}{{ '\\n' }}"
    )
    assert answers(made, talk("Hello?", "Yes.", "Sure?", "No.", pictures={0: 1})) == " Yes.</s> No.</s>"


def test_a_prompt_without_turns_trains_its_last_answer_only():
    """Earlier answers are part of PaliGemma's bidirectional prompt: their features have seen what follows them."""
    assert answers(target("paligemma"), talk("What?", "One.", "And?", "Two.", pictures={0: 1})) == "Two.</s>"


def test_which_slots_train():
    answer = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert trains(answer).nonzero().flatten().tolist() == [3, 4, 8]


def test_messages_after_the_last_answer_are_left_out():
    made = target("llava")
    whole, cut = talk("What?", "Bars.", "And?", pictures={0: 1}), talk("What?", "Bars.", pictures={0: 1})
    rows = [Encoder(made, 4096).row(row).inputs["input_ids"] for row in (whole, cut)]
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("row", "max_length", "said"),
    [
        (talk("What?", pictures={0: 1}), 4096, "no answer"),
        (Conversation((Message("assistant", ("Hi.",)), *talk("What?", "Bars.").messages)), 4096, "no message before"),
        (talk("What?", "Bars.", "And this?", "Lines.", pictures={0: 1, 2: 1}), 20, "cut at max_length 20 in or before"),
        (talk("What is this very long question about?", "Bars.", pictures={0: 1}), 25, "no answer is left"),
    ],
)
def test_rows_that_cannot_train_are_refused(row, max_length, said):
    with pytest.raises(UserError, match=said):
        Encoder(target("llava"), max_length).row(row)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma"])
def test_an_answer_to_nothing_is_no_row_and_no_question(family):
    greeting = Conversation((Message("assistant", ("Hello.",)),))
    with pytest.raises(UserError):
        Encoder(target(family), 4096).row(greeting)
    assert exam(target(family), Listed([greeting]), 1, 4) is None


def test_a_long_answer_is_cut_behind_the_pictures():
    encoder = Encoder(target("qwen2_5_vl"), 40)
    row = encoder.row(talk("What?", "The chart has a title, two axes and a legend. " * 9, pictures={0: 1}))
    assert {
        len(row.image),
        len(row.answer),
        row.inputs["input_ids"].shape[1],
        row.inputs["mm_token_type_ids"].shape[1],
    } == {40}
    assert row.answer[-1]


# --- batches


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_teaches_what_each_row_teaches_alone(family):
    """Different pictures, lengths and numbers of pictures; padding and the mask left out at the door change nothing."""
    made = target(family, torch.float64)
    many = 1 if family.startswith("paligemma") else 2
    rows = [
        tiny.conversation(family, images=1 + i % many, seed=i).then("assistant", "Yes. " * (9 * i * i + 1))
        for i in range(3)
    ]
    encoder = Encoder(made, 4096)
    encoded = [encoder.row(row) for row in rows]
    together = collate(encoded, 0, made.dtype)
    features = made.teach(together.inputs, together.image)
    assert len(set(features.lengths.tolist())) == 3
    slots = 0
    for number, row in enumerate(encoded):
        alone = made.teach(row.inputs, row.image[None])
        full = made.model(**row.inputs, output_hidden_states=True).hidden_states[-1]
        n = len(row.answer)
        torch.testing.assert_close(alone.hidden, full)
        torch.testing.assert_close(features.hidden[number, :n], alone.hidden[0])
        torch.testing.assert_close(features.embeds[number, :n], alone.embeds[0])
        assert torch.equal(features.image[number, :n], row.image)
        assert (
            together.slots[1][together.slots[0] == number].tolist() == trains(row.answer).nonzero().flatten().tolist()
        )
        slots += int(trains(row.answer).sum())
    assert together.slots.shape == (2, slots)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_feature_of_an_answer_looks_ahead(family):
    """What is taught at an answer's token must be what decoding will see there, when nothing follows yet."""
    made = target(family, torch.float64)
    row = Encoder(made, 4096).row(tiny.conversation(family).then("assistant", "Two circles and one triangle."))
    n = int(row.answer.nonzero()[0]) + 3
    shape = row.inputs["input_ids"].shape
    short = {name: value[:, :n] if value.shape == shape else value for name, value in row.inputs.items()}
    whole, cut = made.teach(dict(row.inputs), row.image[None]), made.teach(short, row.image[None, :n])
    torch.testing.assert_close(whole.hidden[:, :n], cut.hidden)


def test_rows_without_pictures_share_a_batch_with_others():
    made = target("llava", torch.float64)
    encoder = Encoder(made, 4096)
    rows = [encoder.row(talk("What?", "Bars.", pictures={0: count})) for count in (0, 1, 0)]
    batch = collate(rows, 0, made.dtype)
    features = made.teach(batch.inputs, batch.image)
    alone = made.teach(rows[2].inputs, rows[2].image[None])
    torch.testing.assert_close(features.hidden[2, : len(rows[2].answer)], alone.hidden[0])


def test_refused_rows_are_counted_not_hidden():
    encoder = Encoder(target("llava"), 4096)
    read = encoder.fresh(Listed([talk("What?"), talk("What?", "Bars.")]))
    batch = encoder.batch([attempt(partial(read, 0)), attempt(partial(read, 1)), UserError("broken")])
    assert len(batch) == 1
    assert batch.refused == ("it has no answer to learn from.", "broken")


def test_the_order_is_a_function_of_seed_and_epoch():
    sizes = list(range(100, 0, -1))
    order = Order(sizes, 8, seed=1)
    assert order.per_epoch == 13
    epoch = order.epoch(0)
    assert sorted(row for batch in epoch for row in batch) == list(range(100))
    assert epoch == Order(sizes, 8, seed=1).epoch(0)
    assert epoch != order.epoch(1) != Order(sizes, 8, seed=2).epoch(1)
    assert max(max(batch) - min(batch) for batch in epoch) < 16  # alike in size

    order.start = 15
    batches = iter(order)
    assert [next(batches) for _ in range(12)] == [*order.epoch(1)[2:], order.epoch(2)[0]]


def test_processes_share_an_epoch_without_overlap():
    shares = [Order([1] * 100, 8, 0, rank, 2).epoch(0) for rank in range(2)]
    rows = [row for share in shares for batch in share for row in batch]
    assert len(shares[0]) == len(shares[1]) == 6
    assert len(set(rows)) == len(rows)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_prepare_the_same_batches_and_end():
    source, made = Listed(answered("llava", 3)), speaker("llava")
    encoder, order = Encoder(made, 4096), Order([1, 2, 3], 2, 0)
    taken = []
    for workers in (0, 2):
        with stream(encoder.fresh(source), encoder, order, workers, pin=False) as batches:
            taken.append([next(batches).inputs["input_ids"] for _ in range(5)])
    assert all(torch.equal(one, other) for one, other in zip(*taken, strict=True))
    assert not torch.multiprocessing.active_children()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", UserError),
        ("DataLoader timed out after 600 seconds", UserError),
        ("mine", RuntimeError),
    ],
)
def test_a_worker_of_a_run_that_is_killed_or_hangs_is_told_of(words, error):
    """Torch learns of a death by a signal, and raises these words from its handler, also amid an update."""
    source, encoder = Listed(answered("llava")), Encoder(speaker("llava"), 4096)
    said = "pictures are slow to fetch.*, and go on with --resume-from latest" if error is UserError else words
    with (
        pytest.raises(error, match=said),
        stream(encoder.fresh(source), encoder, Order([1, 2, 3], 2, 0), 0, pin=False),
    ):
        raise RuntimeError(words)


# --- rows that are kept encoded


def kept(folder, family="llava", workers=0, max_length=4096):
    file = folder / "rows.jsonl"
    if not file.exists():
        tiny.picture().save(folder / "a.png")
        asked = {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]}
        rows = [[asked, {"role": "assistant", "content": text}] for text in ("Bars.", "Two circles.")]
        file.write_text("".join(f"{json.dumps({'messages': row})}\n" for row in (*rows, [asked])))
    encoder, source = Encoder(speaker(family), max_length), JsonLines([file])
    return encoder, source, encoded(folder / "cache", source, encoder, workers)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("family", "workers"), [("llava", 0), ("qwen2_5_vl", 2)])
def test_kept_rows_make_the_batches_of_fresh_ones(tmp_path, family, workers):
    encoder, source, rows = kept(tmp_path, family, workers)
    batches = [
        encoder.batch(attempt(partial(read, index)) for index in range(len(source)))
        for read in (encoder.fresh(source), rows)
    ]
    for name, tensor in batches[0].inputs.items():
        assert tensor.dtype == batches[1].inputs[name].dtype
        assert torch.equal(tensor, batches[1].inputs[name])
    assert torch.equal(batches[0].slots, batches[1].slots)
    assert batches[0].refused == batches[1].refused == ("it has no answer to learn from.",)


def test_kept_rows_are_made_once(tmp_path, monkeypatch):
    encoder, source, _ = kept(tmp_path)
    monkeypatch.setattr(Encoder, "row", lambda *_: pytest.fail("encoded again"))
    assert len(encoded(tmp_path / "cache", source, encoder, 0)) == len(source)


def other(change: str) -> Target:
    """The speaker with another number format, template, size of pictures, tokenizer, end, revision; or as it is."""
    made = Target(copy.copy(speaker("llava").model), copy.deepcopy(tiny.processor("llava")))
    made.model.config = copy.deepcopy(made.model.config)
    if change == "template":
        made.processor.chat_template += " "
    elif change == "pixels":
        made.processor.image_processor.size = {"shortest_edge": 56}
    elif change == "features":
        made.processor.num_additional_image_tokens = 0
    elif change == "tokenizer":
        made.tokenizer.add_tokens(["whole sentences"])
    elif change == "revision":
        made.model.config._commit_hash = "0123"
    elif change == "ends":
        made.__class__ = type("Ending", (Target,), {"eos_token_ids": frozenset({7})})
    elif change == "dtype":
        made.__class__ = type("Half", (Target,), {"dtype": torch.bfloat16})
    return made


CHANGES = ["data", "length", "dtype", "template", "pixels", "features", "tokenizer", "revision", "ends", "transformers"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_rows_depend_on_makes_other_rows(tmp_path, change, monkeypatch):
    _, source, _ = kept(tmp_path)
    folders = lambda: len(list((tmp_path / "cache").glob("*"))) - 1  # noqa: E731 - without the lock
    encoded(tmp_path / "cache", source, Encoder(other("nothing"), 4096), 0)
    assert folders() == 1
    if change == "data":
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"messages": []}\n')
        source = JsonLines([tmp_path / "rows.jsonl"])
    if change == "transformers":
        monkeypatch.setattr(processing.transformers, "__version__", "6.0")
    encoder = Encoder(other(change), 300 if change == "length" else 4096)
    assert len(encoded(tmp_path / "cache", source, encoder, 0)) == len(source)
    assert folders() == 2


def test_a_tokenizer_in_python_alone_is_told_apart_by_its_words():
    made = copy.copy(tiny.processor("llava"))
    made.tokenizer = SimpleNamespace(bos_token=None, get_vocab=lambda: {"a": 0})
    before = described(made)
    made.tokenizer.get_vocab = lambda: {"b": 0}
    assert described(made)["words"] != before["words"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_worker_is_told_of(tmp_path, monkeypatch):
    def row(encoder, conversation):
        if "Two circles." in conversation.messages[-1].content:
            os.kill(os.getpid(), signal.SIGKILL)
        return Encoder.row.__wrapped__(encoder, conversation)

    row.__wrapped__ = Encoder.row
    monkeypatch.setattr(Encoder, "row", row)
    monkeypatch.setattr("speculens.training.encoded.CHUNK", 1)
    with pytest.raises(UserError, match=r"One of 2 workers was killed while it encoded rows.*: lower workers"):
        kept(tmp_path, workers=2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name != ".lock"]
    monkeypatch.undo()
    assert len(kept(tmp_path, workers=2)[2]) == 3


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_end_with_a_parent_that_is_killed():
    """The end of a pipe comes when the last of the processes that inherited it is gone."""
    end, own = os.pipe()

    def make(_):
        os.write(own, b"!")
        signal.pause()

    parent = multiprocessing.get_context("fork").Process(target=lambda: list(_made(make, [range(1)] * 2, 2)))
    parent.start()
    os.close(own)
    assert os.read(end, 1) + os.read(end, 1) == b"!!"
    parent.kill()
    parent.join()
    assert select.select([end], [], [], 60)[0]
    assert os.read(end, 1) == b""
    os.close(end)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_come_in_order_and_few_at_a_time(workers, tmp_path):
    """The makers may run ahead of the reader by a few chunks each, and no more."""

    def make(chunk):
        (tmp_path / str(chunk[0])).touch()
        return [bytes([chunk[0]])]

    made = _made(make, [range(n, n + 1) for n in range(40)], workers)
    assert [next(made) for _ in range(10)] == [[bytes([n])] for n in range(10)]
    assert len(list(tmp_path.iterdir())) <= 10 + AHEAD * workers
    assert [rows[0][0] for rows in made] == list(range(10, 40))


def test_a_file_without_rows_is_kept_too(tmp_path):
    encoder, source, _ = kept(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert len(encoded(tmp_path / "cache", JsonLines([tmp_path / "empty.jsonl"]), encoder, 0)) == 0
    both = encoded(tmp_path / "cache", JsonLines([tmp_path / "empty.jsonl", *source.paths]), encoder, 0)
    assert (len(both), both(0).answer.any()) == (3, True)


def test_kept_rows_of_several_files_follow_each_other(tmp_path):
    encoder, _, rows = kept(tmp_path)
    (tmp_path / "more.jsonl").write_text((tmp_path / "rows.jsonl").read_text().splitlines()[1] + "\n")
    both = encoded(tmp_path / "cache", JsonLines([tmp_path / "rows.jsonl", tmp_path / "more.jsonl"]), encoder, 0)
    assert len(both) == 4
    assert torch.equal(both(3).inputs["input_ids"], rows(1).inputs["input_ids"])
    assert torch.equal(both(0).inputs["input_ids"], rows(0).inputs["input_ids"])


# --- sources


def test_json_lines_are_read_one_by_one(tmp_path):
    tiny.picture().save(tmp_path / "a.png")
    row = {
        "messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}]}]
    }
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n\n" + "{broken\n")
    (tmp_path / "two.jsonl").write_text(json.dumps(row))
    source = JsonLines([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert len(source) == 3
    assert source[0].images[0].size == source[2].images[0].size == tiny.picture().size
    assert source.size(0) == len(json.dumps(row)) + 1 + PICTURE
    with pytest.raises(UserError, match=r"Row 2 of .*one.jsonl is not valid JSON"):
        source[1]
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(UserError, match="no such file"):
        JsonLines([tmp_path / "two.jsonl"], tmp_path / "elsewhere")[0]
    with pytest.raises(UserError, match="cannot be read"):
        JsonLines([tmp_path / "none.jsonl"])


FORMS = {
    "messages": {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]},
    "llava": {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\n?"}]},
    "two": {"images": ["a.png", "a.png"], "conversations": [{"from": "human", "value": "<image> <image>\n?"}]},
    "mmspec": {"id": "a", "image": "a.png", "turns": ["?"], "category": "chart", "topic": "bars"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("array", [False, True])
def test_pictures_weigh_in_the_size_of_a_row(form, array, tmp_path):
    """Else a row of text alone would share its batch with one of as few words and 576 rows of picture."""
    tiny.picture().save(tmp_path / "a.png")
    text = json.dumps(FORMS[form])
    (tmp_path / "rows").write_text(f"[{text}]" if array else text)
    source = JsonLines([tmp_path / "rows"])
    pictures = len(source[0].images)
    assert source.size(0) == len(text) + pictures * PICTURE
    assert pictures * PICTURE <= Listed([source[0]]).size(0) < pictures * PICTURE + len(text)


# --- the loop


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls(family, tmp_path):
    made = speaker(family)
    train(recipe(tmp_path, steps=30), target=made, rows=answered(family))
    losses = [event["loss"] for event in events_of(tmp_path, "step")]
    assert len(losses) == 30
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_trained_drafter_is_accepted_and_changes_nothing(family, tmp_path):
    rows = answered(family)
    folder = train(recipe(tmp_path, steps=60), target=speaker(family), rows=rows, val=rows)
    assert folder == tmp_path / "best"
    (figures,) = events_of(tmp_path, "eval")
    assert figures["exact"] == 1
    assert figures["mean_acceptance_length"] > 1.5
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("metrics", "transformers", "recipe", "3 conversations"))

    question = Conversation(rows[0].messages[:1])
    drafter = load_drafter(folder, dtype=torch.float32)
    fast = Engine(speaker(family), drafter, capacity=256).generate(question, Sampling(max_new_tokens=16))
    assert fast.text.strip() == rows[0].messages[1].content[0]
    assert fast.stats.mean_acceptance_length > 1.5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(accumulation, tmp_path):
    changes = {"batch_size": 1, "accumulation": accumulation, "save_every": 4}
    made, rows = speaker("llava"), answered("llava")
    train(recipe(tmp_path / "whole", **changes), target=made, rows=rows)

    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["step"] == 6:
            raise KilledError

    with pytest.raises(KilledError):
        train(recipe(tmp_path / "parts", **changes), target=made, rows=rows, on_event=kill)
    train(recipe(tmp_path / "parts", **changes), target=made, rows=rows, resume_from="latest")

    whole, parts = (
        [[line[key] for key in ("step", "loss", "grad_norm", "lr")] for line in events_of(tmp_path / name, "step")]
        for name in ("whole", "parts")
    )
    assert whole == parts
    states = [load_drafter(tmp_path / name / "last").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resuming_another_run_is_refused(tmp_path):
    made, rows = speaker("llava"), answered("llava")
    train(recipe(tmp_path, steps=1), target=made, rows=rows)
    with pytest.raises(UserError, match="made with another seed, batch_size"):
        train(recipe(tmp_path, steps=2, seed=1, batch_size=2), target=made, rows=rows, resume_from="latest")
    with pytest.raises(UserError, match="holds a run already"):
        train(recipe(tmp_path, steps=2), target=made, rows=rows)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(recipe(tmp_path / "new"), target=made, rows=rows, resume_from="latest")
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="no checkpoint that this run can go on from"):
        train(recipe(tmp_path, steps=2), target=made, rows=rows, resume_from="latest")


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(recipe(tmp_path, steps=5, save_every=1, keep=2), target=speaker("llava"), rows=answered("llava"))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    names = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "optimizer.pt", "rng.pt", "trainer_state.json"}
    load_drafter(tmp_path / "checkpoint-5")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_last_checkpoint_intact(error, tmp_path, monkeypatch):
    made, rows = speaker("llava"), answered("llava")
    train(recipe(tmp_path, steps=2), target=made, rows=rows)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}

    def fail(*_args: Any, **_kwargs: Any):
        raise error

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(UserError, match=r"could not be written \(.*; .* MiB free there\).*--resume-from latest"):
        train(recipe(tmp_path, steps=3), target=made, rows=rows, resume_from="latest")
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    train(recipe(tmp_path, steps=3), target=made, rows=rows, resume_from="latest")
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-3"


def test_only_what_a_disk_does_is_told_as_a_full_disk(tmp_path):
    with pytest.raises(RecursionError), whole(tmp_path / "made"):
        raise RecursionError("maximum recursion depth exceeded")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": ["gone.jsonl"]}, "The data file gone.jsonl cannot be read"),
        ({"val": "gone.jsonl"}, "There is no file gone.jsonl to measure acceptance on.*data.val=null"),
    ],
)
def test_missing_data_is_told_before_the_target_is_looked_for(data, said, tmp_path):
    recipe_of = partial(recipe, tmp_path / "output", target=str(tmp_path / "none"))
    with pytest.raises(UserError, match=said):
        train(recipe_of(data=data))
    with pytest.raises(UserError, match="There is no model at" if "val" in data else said):
        encode(recipe_of(data=data | {"cache": str(tmp_path)}))
    with pytest.raises(UserError, match=r"data\.cache=FOLDER"):
        encode(recipe_of(data=data))


def test_running_out_of_memory_names_the_knobs(tmp_path, monkeypatch):
    def fail(*_: Any):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("speculens.training.trainer.distil", fail)
    with pytest.raises(UserError, match=r"step 1 with 3 conversations a pass: lower batch_size"):
        train(recipe(tmp_path), target=speaker("llava"), rows=answered("llava"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"not finite at step \d+: lower optimiser.lr"):
        train(recipe(tmp_path, optimiser={"lr": 1e30, "clip": None}), target=speaker("llava"), rows=answered("llava"))


def test_rows_without_answers_are_said_and_end_in_an_error(tmp_path):
    said = []
    rows = [*answered("llava"), talk("What?")]
    train(recipe(tmp_path / "some", batch_size=4), target=speaker("llava"), rows=rows, on_event=said.append)
    assert [event["message"] for event in said if event["event"] == "warning"] == [
        "Some conversations are refused; the first: it has no answer to learn from."
    ]
    assert events_of(tmp_path / "some", "step")[-1]["refused"] == 8
    with pytest.raises(UserError, match=r"None of the 1 conversations can be used.*no answer"):
        train(recipe(tmp_path / "none"), target=speaker("llava"), rows=rows[-1:])


@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_half_precision_trains_too(dtype, tmp_path):
    """Float32 weights beside a bfloat16 target, or bfloat16 throughout; what is kept to decode with is the target's."""
    made = target("llava", torch.bfloat16)
    folder = train(recipe(tmp_path, steps=12, dtype=dtype), target=made, rows=answered("llava"))
    losses = [event["loss"] for event in events_of(tmp_path, "step")]
    assert losses[-1] < losses[0]
    trained = torch.float32 if dtype == "mixed" else torch.bfloat16
    for kept, weights in ((folder, torch.bfloat16), (tmp_path / "checkpoint-12", trained)):
        assert {weight.dtype for weight in load_file(kept / "model.safetensors").values()} == {weights}


def test_a_run_by_the_clock_ends_with_the_clock(tmp_path):
    changes = {"steps": None, "minutes": 0.005}
    train(recipe(tmp_path, **changes), target=speaker("llava"), rows=answered("llava"))
    done = [event["done"] for event in events_of(tmp_path, "step")]
    assert done == sorted(done)
    assert done[-1] == 1
    assert events_of(tmp_path, "end")[0]["seconds"] >= 0.3


def test_the_drafter_is_of_the_targets_kind(tmp_path):
    made = speaker("qwen2_5_vl")
    folder = train(recipe(tmp_path, steps=1), target=made, rows=answered("qwen2_5_vl"))
    config = load_drafter(folder).config
    attention = made.decoder.layers[0].self_attn
    assert config.qkv_bias == (attention.q_proj.bias is not None)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert config.intermediate_size == made.text_config.intermediate_size
