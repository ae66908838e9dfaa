"""The command line as a user meets it: what it prints where, JSON for machines, one sentence for every mistake."""

import contextlib
import errno
import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import oracle
import tiny
from speculens import Conversation, Engine, Sampling, cli, demo, load_drafter, load_target
from speculens.answer import Answer, Entry, Run, ask
from speculens.checkpoints import save_drafter
from speculens.cli.demo import Family
from speculens.show import DRAFTED, Screen, count, size
from speculens.tree import TreeShape

QUESTION = "What is in the picture?"


@dataclass(frozen=True)
class Shelf:
    """Folders that stand for checkpoints, and one picture."""

    root: Path
    llava: str
    qwen: str
    eagle: str
    eagle_qwen: str
    picture: str


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    made = Shelf(root, *(str(root / name) for name in ("llava", "qwen", "eagle", "eagle_qwen", "picture.png")))
    tiny.save("llava", root / "llava")
    tiny.save("qwen2_5_vl", root / "qwen")
    save_drafter(oracle.random_eagle("llava"), made.eagle)
    save_drafter(oracle.random_eagle("qwen2_5_vl"), made.eagle_qwen)
    tiny.picture().save(made.picture)
    return made


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Run a command in this process."""

    def call(*words: object):
        code = cli.main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return call


def answer_of(shelf, drafter="none", question=QUESTION, **sampling: float):
    target = load_target(shelf.llava, dtype="float64")
    guesser = load_drafter(drafter, dtype=target.dtype)
    conversation = Conversation.user(question, [shelf.picture])
    return Engine(target, guesser, capacity=128).generate(conversation, Sampling(**sampling))


# --- generate


@pytest.mark.parametrize("drafter", ["none", "lookup", "eagle"])
def test_generate_prints_the_engines_text_alone(run, shelf, drafter):
    drafter = shelf.eagle if drafter == "eagle" else drafter
    got = run(
        *("generate", "--target", shelf.llava, "--drafter", drafter, "--image", shelf.picture, "--dtype", "float64"),
        *("--max-new-tokens", 24, QUESTION),
    )
    wanted = answer_of(shelf, drafter, max_new_tokens=24)
    assert (got.code, got.out) == (0, wanted.text + "\n")
    assert re.fullmatch(
        r"24 tokens in \d+ passes; acceptance length \d\.\d\d \(\d\.\d\d without the bonus token\); "
        r"\d+\.\d\d s, \d+\.\d tokens/s; cut at max_new_tokens\n",
        got.err,
    )


def test_sampling_options_reach_the_engine(run, shelf):
    settings = dict(
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        no_repeat_ngram_size=4,
        seed=7,
        max_new_tokens=20,
    )
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    got = run("generate", "--target", shelf.llava, "--image", shelf.picture, "--dtype", "float64", *words, QUESTION)
    assert got.out == answer_of(shelf, **settings).text + "\n"


def test_generate_json(run, shelf):
    got = run(
        *("generate", "--target", shelf.llava, "--drafter", shelf.eagle, "--image", shelf.picture, "--json"),
        *("--max-new-tokens", 16, "--compare", QUESTION),
    )
    assert (got.code, got.err) == (0, "")
    said = got.json
    assert said["tokens"] == said["baseline"]["tokens"]
    assert len(said["tokens"]) == 16
    assert said["finish_reason"] == "length"
    assert said["exact"] is True
    assert said["first_difference"] is None
    assert said["walltime_speedup"] == pytest.approx(said["baseline"]["seconds"] / said["seconds"])
    assert said["stats"]["num_tokens"] == 15  # the prefill's token is not counted
    assert {"mean_acceptance_length", "mean_accepted_tokens", "num_drafts"} <= set(said["stats"])
    assert set(said["versions"]) == {"speculens", "torch", "transformers"}


def test_compare_prints_a_table_that_fits_a_terminal(run, shelf):
    got = run(
        *("generate", "--target", shelf.llava, "--drafter", "lookup", "--image", shelf.picture, "--compare"),
        *("--max-new-tokens", 12, "--temperature", 0.8, QUESTION),
    )
    table = got.out.splitlines()[-5:]
    assert [line.split()[0] for line in table[-2:]] == ["none", "lookup"]
    assert all(line.rstrip().endswith("yes") for line in table[-2:])
    assert "acceptance" in got.out
    assert "…" not in got.out
    assert max(map(len, table)) <= 80


def test_the_tree_options_and_their_other_names(run, shelf, monkeypatch):
    seen = []
    original = Engine.__init__

    def spy(self, *args: object, shape=None, **kwargs: object):
        seen.append(shape)
        original(self, *args, shape=shape, **kwargs)

    monkeypatch.setattr(Engine, "__init__", spy)
    command = ("generate", "--target", shelf.llava, "--drafter", shelf.eagle, "--max-new-tokens", 3, "hi")
    run(*command, "--num-steps", 1, "--topk", 2, "--num-draft-tokens", 4)
    run(*command, "--depth", 1, "--total-token", 4)
    run(*command, "--tree", "own", "--tree-topk", 2)
    run(*command)
    run(*command, "--tree", "auto")
    run(*command, "--tree", "own")
    # What is not said beside others is the drafter's own; where nothing is, each step's tree is sized.
    assert seen == [TreeShape(1, 2, 4), TreeShape(1, 3, 4), TreeShape(2, 2, 9), "auto", "auto", None]


def test_picture_or_question_from_standard_input(run, shelf, monkeypatch):
    command = ("generate", "--target", shelf.llava, "--max-new-tokens", 8)
    wanted = run(*command, "--image", shelf.picture, QUESTION).out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(shelf.picture).read_bytes())))
    assert run(*command, "--image", "-", QUESTION).out == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{QUESTION}\n".encode())))
    assert run(*command, "--image", shelf.picture, "-").out == wanted


def test_system_message_and_stop_string(run, shelf):
    command = ("generate", "--target", shelf.llava, "--max-new-tokens", 30, QUESTION)
    plain = run(*command).out
    assert run(*command, "--system", "Be brief.").out != plain
    stop = plain[4:6]
    assert run(*command, "--stop", stop, "--json").json["finish_reason"] == "stop"


def test_html_page(run, shelf, tmp_path):
    page = tmp_path / "new" / "answer.html"
    got = run(
        "generate", "--target", shelf.llava, "--image", shelf.picture, "--max-new-tokens", 4, "--html", page, "a < b?"
    )
    assert got.code == 0
    html = page.read_text(encoding="utf-8")
    assert "a &lt; b?" in html
    assert "<h3>picture.png</h3>" in html
    assert 'src="data:image/' in html


# --- colours


@pytest.fixture(scope="module")
def drafted() -> Answer:
    """An answer much of which was drafted."""
    request, sampling = oracle.Ask(), Sampling(max_new_tokens=30)
    guesser = oracle.oracle("llava", [request], [sampling])
    engine = Engine(oracle.target("llava"), guesser, capacity=oracle.CAPACITY)
    return ask(engine, oracle.prompt("llava", request), sampling)


def test_runs_are_the_text_and_say_what_was_drafted(drafted):
    assert "".join(run.text for run in drafted.runs) == drafted.generation.text
    assert {run.drafted for run in drafted.runs} == {True, False}
    assert drafted.generation.stats.num_accepted_tokens > 5
    assert drafted.time_to_first_token < drafted.seconds


def test_drafted_runs_are_coloured_on_a_terminal(drafted, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    for run in drafted.runs:
        screen.run(run)
    screen.legend()
    out = capsys.readouterr().out
    assert DRAFTED == "green"
    for run in drafted.runs:
        if run.drafted and run.text.isascii() and run.text.isprintable():
            assert f"\x1b[32m{run.text}\x1b[0m" in out
    assert "drafted and kept" in out


def test_a_model_cannot_drive_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    Screen().run(Run("a\x1b]0;owned\x07\x9b2Jb\n", drafted=False))
    assert capsys.readouterr().out == "a\ufffd]0;owned\ufffd\ufffd2Jb\n"


def test_piped_text_is_exactly_the_models(capsys):
    Screen().run(Run("tab\t bell\x07 trailing   \n", drafted=True))
    assert capsys.readouterr().out == "tab\t bell\x07 trailing   \n"


def test_an_inexact_answer_is_shown_as_such(drafted):
    tokens = list(drafted.generation.tokens)
    tokens[3] += 1
    other = replace(drafted, generation=replace(drafted.generation, tokens=tokens))
    shorter = replace(drafted, generation=replace(drafted.generation, tokens=tokens[:3]))
    entry = Entry("x", [drafted, other, shorter], [drafted] * 3)
    assert entry.num_exact == 1
    assert entry.differences == [None, 3, 3]
    assert entry.to_dict()["exact"] == pytest.approx(1 / 3)


def test_figures_for_people():
    assert [count(n) for n in (999, 280_736, 9_100_000, 7_062_902_784)] == ["999", "280,736", "9.1 M", "7.06 G"]
    assert [size(n) for n in (512, 57_344, 3 << 20)] == ["512 B", "56.0 KiB", "3.0 MiB"]


# --- inspect


def test_inspect_a_pair_that_fits(run, shelf):
    got = run("inspect", "--target", shelf.llava, "--drafter", shelf.eagle, "--json").json
    assert got["fits"] is True
    assert got["reason"] is None
    target, model = got["target"], tiny.model("llava")
    assert target["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert target["kv_bytes_per_token"] == 2 * tiny.LAYERS * 2 * 16 * 8  # K and V, layers, heads, head_dim, float64
    assert (target["model_type"], target["positions"], target["image_token"]) == ("llava", "1-D", "<image>")
    assert target["eos_tokens"] == ["</s>"]
    drafter = got["drafter"]
    assert drafter["image_contract"] == "full"
    assert drafter["tree"] == {"num_steps": 2, "topk": 3, "num_draft_tokens": 9}
    assert drafter["bytes"] == (Path(shelf.eagle) / "model.safetensors").stat().st_size


def test_inspect_says_why_a_pair_does_not_fit(run, shelf):
    got = run("inspect", "--target", shelf.qwen, "--drafter", shelf.eagle)
    assert got.code == 0
    assert "M-RoPE" in got.out
    assert re.search(r"made for a target of .* but this target has", got.out)
    assert run("inspect", "--target", shelf.qwen, "--drafter", shelf.eagle, "--json").json["fits"] is False


def test_inspect_one_of_them(run, shelf):
    assert run("inspect", "--target", shelf.llava, "--json").json["fits"] is None
    assert "nothing (hidden)" in run("inspect", "--drafter", "lookup").out
    assert "seconds" not in run("inspect", "--drafter", "none").out


def test_inspect_shows_what_a_drafter_keeps_of_a_picture(run, shelf):
    asked = ("inspect", "--target", shelf.llava, "--drafter", shelf.eagle, "--image", shelf.picture)
    view = run(*asked, "--json").json["view"]
    assert view["num_drafter_rows"] == view["num_prompt_tokens"] > view["num_visual_tokens"] > 0
    assert view["drafter_prefill_ratio"] == 1
    assert "100.0% of the target's" in run(*asked).out


# --- train


@pytest.fixture
def recipe(shelf, tmp_path):
    row = {
        "id": "a",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "path": shelf.picture}, {"type": "text", "text": QUESTION}],
            },
            {"role": "assistant", "content": "The picture shows a small red square on a blue field."},
        ],
    }
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n")
    values = {
        "target": shelf.llava,
        "output": str(tmp_path / "run"),
        "drafter": {"method": "eaglevlm", "tree": {"num_steps": 1, "topk": 2, "num_draft_tokens": 4}},
        "data": {"train": [str(data)], "val": str(data)},
        "dtype": "float32",
        "batch_size": 1,
        "steps": 2,
        "workers": 0,
        "eval_prompts": 1,
        "eval_tokens": 4,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_writes_a_drafter_that_generate_takes(run, shelf, recipe):
    got = run("train", "-c", recipe, "optimiser.lr=1e-3")
    assert got.code == 0
    assert "without the bonus token" in got.out
    folder = got.out.splitlines()[-1].removeprefix("The drafter is in ").rstrip(".")
    assert run("generate", "--target", shelf.llava, "--drafter", folder, "--max-new-tokens", 4, "hi").code == 0


def test_train_dry_run_shows_the_whole_recipe(run, recipe):
    shown = yaml.safe_load(run("train", "-c", recipe, "optimiser.lr=1e-3", "--dry-run").out)
    assert shown["optimiser"]["lr"] == pytest.approx(1e-3)
    assert shown == run("train", "-c", recipe, "optimiser.lr=1e-3", "--dry-run", "--json").json
    assert not Path(shown["output"]).exists()


# --- demo


@pytest.fixture(scope="module")
def testbed(shelf, tmp_path_factory):
    """A testbed with tiny models and one picture a file."""
    folder = tmp_path_factory.mktemp("testbed")
    shutil.copytree(shelf.llava, folder / "weights" / "llava")
    shutil.copytree(shelf.qwen, folder / "weights" / "qwen2_5_vl")
    shutil.copytree(shelf.eagle, folder / "weights" / "llava-eaglevlm")
    shutil.copytree(shelf.eagle_qwen, folder / "weights" / "qwen2_5_vl-eaglevlm")
    (folder / "heldout" / "pictures").mkdir(parents=True)
    for name, metadata in (("charts", {}), ("openstax", {"credit": "OpenStax", "license": "CC BY 4.0"})):
        tiny.picture(len(name)).save(folder / "heldout" / "pictures" / f"{name}.png")
        content = [{"type": "image", "path": f"pictures/{name}.png"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A reference."}]
        row = {"id": name, "messages": messages, "metadata": metadata}
        (folder / "heldout" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_demo(run, testbed, tmp_path):
    page = tmp_path / "index.html"
    got = run("demo", "--testbed", testbed, "--out", page, "--max-new-tokens", 6)
    assert [*Family] == ["all", *demo.FAMILIES]
    assert (got.code, got.err) == (0, "")
    assert got.out.count(QUESTION) == 4  # two pictures, two families
    assert got.out.count("2 of 2") == 6  # three drafters, two families, all exact
    assert str(page) in got.out
    assert "OpenStax, CC BY 4.0" in page.read_text(encoding="utf-8")


def test_demo_json(run, testbed, tmp_path):
    page = tmp_path / "index.html"
    got = run("demo", "--testbed", testbed, "--out", page, "--max-new-tokens", 5, "--family", "llava", "--json").json
    (family,) = got["families"]
    assert [line["drafter"] for line in family["drafters"]] == ["none", "lookup", "eaglevlm"]
    assert all(line["exact"] == 1 and line["num_output_tokens"] == 10 for line in family["drafters"])
    assert family["drafters"][0]["walltime_speedup"] == 1
    assert [answer["picture"] for answer in family["answers"]] == ["charts.png", "openstax.png"]
    assert "A reference." not in page.read_text(encoding="utf-8")


# --- mistakes: one sentence, status 2, no traceback


def png_header(width, height) -> bytes:
    """A PNG that claims to be of this size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.fixture(scope="module")
def broken(shelf):
    """Things that cannot be used, by name."""
    root = shelf.root / "broken"
    root.mkdir()
    whole = Path(shelf.picture).read_bytes()
    for name, data in (
        ("cut.png", whole[: len(whole) // 2]),
        ("text.png", b"not a picture at all"),
        ("bomb.png", png_header(60_000, 60_000)),
        ("flat.png", png_header(0, 5)),
        ("empty.png", b""),
        ("recipe.yaml", b"target: x\nobjetive: {}\n"),
    ):
        (root / name).write_bytes(data)
    for name, original, tensor in (("nan", shelf.llava, "lm_head.weight"), ("nan_eagle", shelf.eagle, "fc.weight")):
        shutil.copytree(original, root / name)
        state = load_file(root / name / "model.safetensors")
        next(value for key, value in state.items() if key.endswith(tensor.split(".")[0] + ".weight"))[0, 0] = torch.nan
        save_file(state, root / name / "model.safetensors", metadata={"format": "pt"})
    for name in ("short", "fewer", "list", "types", "llama"):
        shutil.copytree(shelf.llava, root / name)
    config = json.loads((root / "types" / "config.json").read_text())
    config["text_config"]["hidden_size"] = "large"
    for name, values in (("list", [1]), ("types", config), ("llama", {"model_type": "llama"})):
        (root / name / "config.json").write_text(json.dumps(values))
    weights = root / "short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    state = load_file(root / "fewer" / "model.safetensors")
    state.pop(next(key for key in state if "mlp" in key))
    save_file(state, root / "fewer" / "model.safetensors", metadata={"format": "pt"})
    return root


PICTURES = [
    ("gone.png", "there is no such file"),
    ("cut.png", "damaged or cut short"),
    ("text.png", "not in a known picture format"),
    ("bomb.png", "pixels"),
    ("flat.png", "Cannot use"),
    ("empty.png", "it is empty"),
    (".", "directory"),
]


def assert_one_sentence(got, phrase):
    assert (got.code, got.out) == (2, "")
    assert re.fullmatch(r"speculens: [^\n]+[^\n ]\n", got.err), got.err
    assert phrase in got.err
    assert "Traceback" not in got.err


@pytest.mark.parametrize(("name", "phrase"), PICTURES)
def test_bad_pictures(run, shelf, broken, name, phrase):
    got = run("generate", "--target", shelf.llava, "--image", shelf.picture, "--image", broken / name, QUESTION)
    assert_one_sentence(got, phrase)


MISTAKES = {
    "no target": (["generate", "hi"], "--target"),
    "no question": (["generate", "--target", "{llava}"], "Missing argument"),
    "empty question": (["generate", "--target", "{llava}", ""], "question is empty"),
    "unknown option": (["generate", "--target", "{llava}", "--topp", "1", "hi"], "--topp"),
    "unknown command": (["frobnicate"], "frobnicate"),
    "not a number": (["generate", "--target", "{llava}", "--seed", "x", "hi"], "--seed"),
    "bad temperature": (
        ["generate", "--target", "{llava}", "--temperature", "-1", "hi"],
        "temperature must be 0 or more",
    ),
    "no such target": (["generate", "--target", "{broken}/none", "hi"], "There is no model at"),
    "target is no model": (["generate", "--target", "{broken}", "hi"], "There is no model at"),
    "no such drafter": (["generate", "--target", "{llava}", "--drafter", "{broken}/no", "hi"], "There is no drafter"),
    "wrong target": (["generate", "--target", "{qwen}", "--drafter", "{eagle}", "hi"], "but this target has"),
    "NaN in target": (["generate", "--target", "{broken}/nan", "hi"], "not finite"),
    "weights cut short": (["generate", "--target", "{broken}/short", "hi"], "broken"),
    "weights missing": (["generate", "--target", "{broken}/fewer", "hi"], "are missing"),
    "NaN in drafter": (["generate", "--target", "{llava}", "--drafter", "{broken}/nan_eagle", "hi"], "not finite"),
    "too long": (["generate", "--target", "{llava}", "many words " * 2000], "the model's context is 4096"),
    "too much asked": (
        ["generate", "--target", "{llava}", "--max-new-tokens", "5000", "hi"],
        "lower max_new_tokens",
    ),
    "small slot": (["generate", "--target", "{llava}", "--max-model-len", "20", "hi"], "--max-model-len"),
    "placeholder": (["generate", "--target", "{llava}", "look: <image>"], "<image>"),
    "no tree": (["generate", "--target", "{llava}", "--num-steps", "3", "hi"], "leave out --num-steps"),
    "sized and pinned": (
        ["generate", "--target", "{llava}", "--drafter", "lookup", "--tree", "auto", "--topk", "3", "hi"],
        "leave out --topk",
    ),
    "bench sized and pinned": (
        ["bench", "--target", "{llava}", "--suite", "mmspec", "--out", "new", "--tree", "auto", "--depth", "3"],
        "leave out --num-steps",
    ),
    "no beam": (["generate", "--target", "{llava}", "--drafter", "lookup", "--topk", "0", "hi"], "topk must be"),
    "compare with itself": (["generate", "--target", "{llava}", "--compare", "hi"], "--drafter"),
    "stdin twice": (["generate", "--target", "{llava}", "--image", "-", "-"], "Standard input"),
    "no such device": (["generate", "--target", "{llava}", "--device", "abacus", "hi"], "device abacus cannot be used"),
    "nothing to inspect": (["inspect"], "--target"),
    "inspect nothing": (["inspect", "--target", "{broken}"], "There is no model at"),
    "config is no config": (["inspect", "--target", "{broken}/list"], "{broken}/list"),
    "config of wrong types": (["generate", "--target", "{broken}/types", "hi"], "expected int, got str"),
    "language model": (["inspect", "--target", "{broken}/llama"], "takes no pictures"),
    "device without numbers": (["generate", "--target", "{llava}", "--device", "meta", "hi"], "device meta"),
    "recipe is a picture": (["train", "-c", "{picture}"], "no text in UTF-8"),
    "unknown recipe key": (["train", "-c", "{broken}/recipe.yaml"], "did you mean objective?"),
    "no recipe": (["train", "-c", "{broken}/gone.yaml"], "cannot be read"),
    "bad override": (["train", "-c", "{broken}/recipe.yaml", "steps"], "section.key=value"),
    "no testbed": (["demo", "--testbed", "{broken}"], "--testbed"),
    "unknown family": (["demo", "--family", "cat"], "cat"),
}


@pytest.mark.parametrize(("words", "phrase"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(run, shelf, broken, words, phrase):
    names = {"broken": broken, **vars(shelf)}
    assert_one_sentence(run(*(word.format(**names) for word in words)), phrase.format(**names))


def raiser(error):
    def fail(*_: object, **__: object):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), "lower --max-model-len"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), "lower --max-model-len"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "a.html"), "a.html cannot be used: Permission denied"),
    ],
)
def test_what_the_machine_lacks(run, shelf, monkeypatch, error, phrase):
    monkeypatch.setattr("speculens.answer.ask", raiser(error))
    assert_one_sentence(run("generate", "--target", shelf.llava, "hi"), phrase)


def test_our_own_mistakes_keep_their_traceback(run, shelf, monkeypatch):
    monkeypatch.setattr("speculens.answer.ask", raiser(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run("generate", "--target", shelf.llava, "hi")


def test_a_question_that_is_no_text(run, shelf, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(shelf.picture).read_bytes()), "utf-8"))
    assert_one_sentence(run("generate", "--target", shelf.llava, "-"), "Standard input holds no text")


def test_a_full_disk_leaves_no_half_of_a_drafter(run, shelf, tmp_path, monkeypatch):
    words = ("export", "--to", "ours", "--target", shelf.llava, "--drafter", shelf.eagle, "--out", tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr("speculens.checkpoints.ours.save_file", raiser(OSError(errno.ENOSPC, "No space left on device")))
        assert_one_sentence(run(*words), "Make room and run the same command again")
    assert list(tmp_path.iterdir()) == []
    assert run(*words).code == 0


def test_interrupting_an_import_is_quiet(run, shelf, monkeypatch):
    """Amid an import KeyboardInterrupt may be swallowed, and what fails then is the import."""

    def swallowed(*_: object, **__: object):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("cannot load module more than once per process")

    monkeypatch.setattr("speculens.answer.ask", swallowed)
    assert run("generate", "--target", shelf.llava, "hi") == Result(130, "", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupting_is_quiet(run, shelf, monkeypatch):
    monkeypatch.setattr("speculens.answer.ask", raiser(KeyboardInterrupt))
    assert run("generate", "--target", shelf.llava, "hi") == Result(130, "", "")


# --- a process of its own


def test_help_does_not_wait_for_torch():
    """`speculens --help` is there at once: neither torch nor transformers may be imported for it."""
    code = "import sys, speculens.cli; sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_it_starts_as_a_module(run):
    done = subprocess.run([sys.executable, "-m", "speculens", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == run("--version").out


def test_version_and_help(run):
    assert re.fullmatch(r"speculens \d+\.\d+\.\d+\n", run("--version").out)
    got = run("--help")
    assert got.code == 0
    assert all(verb in got.out for verb in ("generate", "inspect", "train", "demo"))


def test_a_reader_who_leaves_early(shelf):
    """As in `speculens generate ... | head -c 1`: no complaint on standard error."""
    code = "import sys; from speculens.cli import main; sys.exit(main())"
    words = ["generate", "--target", shelf.llava, "--max-new-tokens", "200", "hi"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
