"""A reduced draft vocabulary: which tokens it holds, that nothing but the drafts changes, and how it is stored."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from jsonlines import write
from oracle import CAPACITY, Ask, assert_exact, prompt, reference, target
from speculens import cli
from speculens.checkpoints import load_drafter, save_drafter, save_published
from speculens.conversation import Conversation
from speculens.data import JsonLines, Listed
from speculens.data.vocabulary import commonest
from speculens.drafters import METHODS
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from speculens.tree import TreeShape

TREE = TreeShape(num_steps=2, topk=3, num_draft_tokens=9)
ANSWERS = ["Two red bars.", "Two red bars and a line.", "Three bars."]
ASKS = [Ask(), Ask(images=2, seed=1)]
LONG = [Sampling(max_new_tokens=14)] * len(ASKS)


def made(method: str, family: str = "llava"):
    """A drafter of random weights that drafts every token."""
    torch.manual_seed(0)
    recipe = DrafterRecipe(method, intermediate_size=96, input_norm=False, tree=TREE)
    drafter = make_drafter(recipe, target(family)).to(torch.float64)
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return drafter.eval().requires_grad_(False)


def said(count: int = 5) -> torch.Tensor:
    """Tokens of the reference texts, so that some drafts are accepted."""
    texts = [reference("llava", ask, sampling) for ask, sampling in zip(ASKS, LONG, strict=True)]
    return torch.tensor(sorted(set().union(*texts))[:count])


def drafted(drafter, sampling):
    """The text, and every token of every tree below its root."""
    engine = Engine(target("llava"), drafter, capacity=CAPACITY)
    steps = list(engine.stream(prompt("llava", Ask()), sampling))
    tokens = [token for step in steps for token in step.tokens]
    return tokens, torch.cat([step.tree.tokens[0, 1:] for step in steps[1:]])


# --- in use


@pytest.mark.parametrize("method", METHODS)
def test_decoding_with_a_tiny_draft_vocabulary_is_exact_and_drafts_only_its_tokens(method):
    drafter = made(method).trimmed(said())
    assert_exact("llava", drafter, ASKS, LONG)
    _, tokens = drafted(drafter, LONG[0])
    assert len(tokens) > 0
    assert set(tokens.tolist()) <= set(said().tolist())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_text_as_with_every_token(method):
    sampling = Sampling(max_new_tokens=14, temperature=1.0, seed=3)
    assert drafted(made(method).trimmed(said()), sampling)[0] == drafted(made(method), sampling)[0]


def test_a_draft_vocabulary_of_every_token_drafts_the_same_trees():
    whole = torch.arange(target("llava").vocab_size)
    for mine, own in zip(drafted(made("hivis").trimmed(whole), LONG[0]), drafted(made("hivis"), LONG[0]), strict=True):
        assert list(mine) == list(own)


def test_rows_of_a_head_are_what_the_head_gives_there():
    """Also with a bias and under a final soft-cap."""
    for family in ("llava", "gemma3"):
        made_for = target(family)
        tokens, hidden = torch.tensor([7, 3, 300]), torch.randn(2, 5, made_for.hidden_size, dtype=torch.float64)
        rows = made_for.head_rows(tokens)
        torch.testing.assert_close(made_for.logits(hidden, rows), made_for.logits(hidden)[..., tokens])
        assert rows.weight.untyped_storage().nbytes() == 3 * made_for.hidden_size * 8


def test_a_list_that_would_make_equal_siblings_is_refused():
    with pytest.raises(UserError, match="different ids"):
        Engine(target("llava"), made("eaglevlm").trimmed(torch.tensor([5, 6, 6, 7])))
    with pytest.raises(UserError, match="different ids"):
        Engine(target("llava"), made("eaglevlm").trimmed(torch.tensor([5, 6, 100_000])))
    with pytest.raises(UserError, match="topk 3 is larger than the draft vocabulary of 2"):
        Engine(target("llava"), made("eaglevlm").trimmed(torch.tensor([5, 6])))


# --- the list


def answered(*answers: str) -> Listed:
    return Listed([Conversation.user("What?").then("assistant", text) for text in answers])


def test_the_commonest_tokens_of_answers_with_all_that_end_a_text():
    made_for = target("llava")
    words = made_for.tokenizer
    always = {token for token in (*made_for.eos_token_ids, *words.all_special_ids) if token < made_for.vocab_size}
    rest = sorted(set(words("bars", add_special_tokens=False)["input_ids"]))
    counted = commonest(answered(*["bars"] * 9, "Two red bars and a line"), made_for, len(always) + len(rest))
    assert counted.tokens.tolist() == sorted({*always, *rest})
    texts = [*["bars"] * 9, "Two red bars and a line"]
    ids = [token for text in texts for token in words(text, add_special_tokens=False)["input_ids"]]
    assert counted.counted == len(ids)
    assert counted.coverage == sum(token in {*always, *rest} for token in ids) / len(ids)


def test_the_lowest_ids_fill_up():
    tokens = commonest(answered("bars"), target("llava"), 60).tokens
    assert tokens.tolist() == sorted(set(tokens.tolist()))
    assert len(tokens) == 60
    assert set(range(40)) <= set(tokens.tolist())


@pytest.mark.parametrize("size", [1, 402])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(UserError, match="401 tokens"):
        commonest(answered("bars"), target("llava"), size)


def test_rows_without_answers_are_refused():
    with pytest.raises(UserError, match="no answers"):
        commonest(Listed([Conversation.user("What?")]), target("llava"), 50)


# --- stored, trained, told


def test_a_trimmed_drafter_comes_back(tmp_path):
    trimmed = made("vispec").trimmed(said())
    loaded = load_drafter(save_drafter(trimmed, tmp_path), dtype=torch.bfloat16)
    assert torch.equal(loaded.d2t, said())
    assert loaded.config == replace(made("vispec").config, draft_vocab_size=5)


def test_published_layouts_refuse_it(tmp_path):
    with pytest.raises(UserError, match="drafts every token"):
        save_published(made("hivis").trimmed(said()), "hivis", tmp_path, target("llava"))


def test_training_drafts_the_commonest_tokens_and_learns_as_without(tmp_path):
    """Losses are over the whole vocabulary: the weights do not depend on the list."""
    plan = {"batch_size": 4, "steps": 2}
    plain = runs.run(tmp_path / "plain", **plan, drafter={"method": "eaglevlm", "tree": runs.TREE})
    small = {"method": "eaglevlm", "tree": runs.TREE, "draft_vocab_size": 50}
    trimmed = runs.run(tmp_path / "trimmed", **plan, drafter=small)
    mine, own = (load_file(folder / "model.safetensors") for folder in (trimmed, plain))
    assert torch.equal(mine.pop("d2t"), commonest(Listed(runs.rows()), runs.target(), 50).tokens)
    assert mine.keys() == own.keys()
    assert all(torch.equal(mine[name], own[name]) for name in own)
    second = {**small, "draft_vocab_size": 60, "init_from": str(trimmed)}  # another list over the same weights
    assert len(load_file(runs.run(tmp_path / "second", **plan, drafter=second) / "model.safetensors")["d2t"]) == 60


def test_trim_and_inspect(tmp_path, capsys):
    tiny.save("llava", tmp_path / "target", torch.bfloat16)
    save_drafter(made("hivis").to(torch.bfloat16), tmp_path / "drafter")
    rows = [
        {"id": i, "image": "nowhere.png", "conversations": [
            {"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": text}]}
        for i, text in enumerate(ANSWERS)
    ]  # fmt: skip
    write(tmp_path / "rows.jsonl", rows)

    def call(*words: object) -> str:
        code = cli.main([str(word) for word in words])
        told = capsys.readouterr()
        return told.out if code == 0 else told.err

    asked = ["--data", tmp_path / "rows.jsonl", "--target", tmp_path / "target", "--out", tmp_path / "out"]
    report = json.loads(call("trim", tmp_path / "drafter", *asked, "--size", 60, "--json"))
    assert (report["draft_vocab_size"], report["coverage"]) == (60, 1.0)
    other = [*asked[:-1], tmp_path / "other"]
    as_option = call("trim", "--drafter", tmp_path / "drafter", *other, "--size", 60, "--json")
    assert json.loads(as_option) == report | {"path": str(tmp_path / "other")}
    twice = call("trim", tmp_path / "drafter", "--drafter", tmp_path / "drafter", *other, "--size", 60)
    assert "named twice" in twice
    assert "Name the drafter" in call("trim", *other, "--size", 60)
    tokens = load_drafter(tmp_path / "out").d2t
    assert torch.equal(tokens, commonest(JsonLines([tmp_path / "rows.jsonl"]), target("llava"), 60).tokens)
    told = call("inspect", "--drafter", tmp_path / "out", "--target", tmp_path / "target")
    told = " ".join(told.split())
    assert "60 of 401 tokens; their rows of the target's head, 3,840 numbers, are copied in use" in told
    assert "They fit." in told
    assert "not empty" in call("trim", tmp_path / "drafter", *asked, "--size", 60)
    assert "no head to trim" in call("trim", "lookup", *asked[:-1], tmp_path / "third", "--size", 60)
