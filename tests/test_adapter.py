"""`model.generate(custom_generate=...)` gives what plain `generate` gives."""

import copy

import pytest
import torch
from transformers import StopStringCriteria, TextStreamer
from transformers.generation import logits_process
from transformers.generation.streamers import BaseStreamer

import tiny
from oracle import Ask, compare, drafter, oracle, prompt, random_eagle, reference
from speculens.adapter import custom_generate
from speculens.drafters import LookupDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.sampling import Sampling
from speculens.targets import Target

LONG = Sampling(max_new_tokens=20)
FIRST = Ask()


def generate(family, ask=FIRST, **settings: object):
    """Output tokens of Hugging Face's generate, and the prompt's length."""
    asked = prompt(family, ask)
    words = tiny.tokenizer(family)
    given = dict(max_new_tokens=20, do_sample=False, pad_token_id=words.pad_token_id) | settings
    ids = tiny.model(family).generate(**asked.inputs, **given)
    assert torch.equal(ids[0, : len(asked)], asked.ids)
    return ids[0, len(asked) :].tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_equals_plain_generate(family):
    guesser = oracle(family, [Ask()], [LONG])
    compare(generate(family, custom_generate=custom_generate(guesser)), reference(family, Ask(), LONG), family)


@pytest.mark.parametrize("name", ["none", "lookup", "eagle"])
@pytest.mark.parametrize("ask", [Ask(images=0), Ask(images=2, turns=2, seed=1)], ids=str)
def test_greedy_equals_plain_generate_with_any_drafter(name, ask):
    for family in ("llava", "qwen2_5_vl"):
        function = custom_generate(drafter(name, family, [ask], [LONG]))
        compare(generate(family, ask, custom_generate=function), reference(family, ask, LONG), family)


# Each makes its settings from the tokens that would come without them.
SETTINGS = {
    "penalties": lambda _: dict(repetition_penalty=1.2, no_repeat_ngram_size=2),
    "eos": lambda text: dict(eos_token_id=[text[9], text[5]]),
    "eos, but not yet": lambda text: dict(eos_token_id=[text[2]], min_new_tokens=12),
    "suppressed tokens": lambda text: dict(suppress_tokens=text[3:7], begin_suppress_tokens=text[:1]),
    "bad words": lambda text: dict(bad_words_ids=[[text[4]], text[1:3]]),
    "bias": lambda text: dict(sequence_bias=[[[text[3]], -20.0], [text[6:8], -20.0]]),
    "forced end": lambda _: dict(forced_eos_token_id=7),
    "max_length": lambda _: dict(max_new_tokens=None, max_length=len(prompt("llava", FIRST)) + 11),
    "own processor": lambda text: dict(logits_processor=[logits_process.SuppressTokensLogitsProcessor(text[:2])]),
    "own criterion": lambda _: dict(stopping_criteria=[lambda ids, _: torch.full((len(ids),), ids.shape[1] > 45)]),
    "stop string": lambda _: dict(stopping_criteria=[StopStringCriteria(tiny.tokenizer("llava"), ["e"])]),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_generates_own_processors_and_criteria_are_honoured(setting):
    text = reference("llava", FIRST, LONG)
    settings = SETTINGS[setting](text)
    plain = generate("llava", **settings)
    guesser = oracle("llava", [FIRST], [LONG])
    guesser.script.append((prompt("llava", FIRST).ids.tolist(), [*plain, *text]))  # it would like to go on
    compare(generate("llava", custom_generate=custom_generate(guesser), **settings), plain, setting)
    assert plain != text, "the setting must make a difference"


def test_sampling_with_one_seed_is_the_same_with_any_drafter():
    settings = dict(do_sample=True, temperature=0.9, top_p=0.9, top_k=30, repetition_penalty=1.1)
    texts = [
        [generate("llava", custom_generate=custom_generate(guesser), seed=seed, **settings) for seed in range(4)]
        for guesser in (None, LookupDrafter(), random_eagle("llava"))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(text) for text in texts[0]}) == 4


def test_sampling_obeys_top_k():
    assert generate("llava", custom_generate=custom_generate(), do_sample=True, top_k=1, seed=3) == reference(
        "llava", FIRST, LONG
    )


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_streamer_gets_what_plain_generate_gives_it():
    ours, theirs = Recorder(), Recorder()
    generate("llava", streamer=theirs)
    generate("llava", custom_generate=custom_generate(oracle("llava", [Ask()], [LONG])), stream_to=ours)
    assert [part.tolist() for part in ours.parts] == [part.tolist() for part in theirs.parts]
    assert ours.ended


def test_text_streamer_that_skips_the_prompt_shows_the_answer(capsys):
    words = tiny.tokenizer("llava")
    generate("llava", custom_generate=custom_generate(), stream_to=TextStreamer(words, skip_prompt=True))
    assert capsys.readouterr().out.strip("\n") == words.decode(reference("llava", FIRST, LONG)).strip("\n")


def test_a_function_that_is_kept_prepares_a_model_once_and_follows_another(monkeypatch):
    made = []
    monkeypatch.setattr("speculens.adapter.Target", lambda model: made.append(model) or Target(model))
    function = custom_generate()
    for family in ("llava", "llava", "qwen2_5_vl"):
        compare(generate(family, custom_generate=function), reference(family, Ask(), LONG), family)
    assert made == [tiny.model("llava"), tiny.model("qwen2_5_vl")]


def test_the_engine_is_made_anew_where_it_does_not_fit_any_more(monkeypatch):
    made = []
    monkeypatch.setattr(
        "speculens.adapter.Engine", lambda *args, **kw: made.append(kw["capacity"]) or Engine(*args, **kw)
    )
    function, model = custom_generate(), copy.deepcopy(tiny.model("llava"))
    given = dict(prompt("llava", FIRST).inputs, custom_generate=function, do_sample=False)
    expected = reference("llava", FIRST, LONG)

    def generated(tokens):
        return model.generate(**given, max_new_tokens=tokens)[0, len(prompt("llava", FIRST)) :].tolist()

    assert generated(20) == generated(20) == expected
    assert made == [256]
    assert generated(300)[:20] == expected
    assert made == [256, 512]
    for weight in model.parameters():
        weight.data = weight.data.clone()  # as a move to another device and back would
    assert generated(20) == expected
    assert made == [256, 512, 256]


def test_a_model_in_training_goes_on_as_it_was():
    model = copy.deepcopy(tiny.model("llava")).requires_grad_(True).train()
    model.get_decoder().embed_tokens.requires_grad_(False)
    next(model.get_decoder().layers.children()).eval()
    before = [module.training for module in model.modules()], [weight.requires_grad for weight in model.parameters()]
    function = custom_generate()
    for _ in range(2):
        ids = model.generate(
            **prompt("llava", FIRST).inputs, custom_generate=function, max_new_tokens=20, do_sample=False
        )
        compare(ids[0, len(prompt("llava", FIRST)) :].tolist(), reference("llava", FIRST, LONG))
        after = [module.training for module in model.modules()], [weight.requires_grad for weight in model.parameters()]
        assert after == before


def test_batches_are_refused_with_their_size():
    inputs = {name: torch.cat([x, x]) for name, x in prompt("llava", Ask()).inputs.items()}
    with pytest.raises(UserError, match="one sequence, not 2"):
        tiny.model("llava").generate(**inputs, custom_generate=custom_generate(), max_new_tokens=4)


def test_padding_is_refused():
    inputs = {name: torch.nn.functional.pad(x, (2, 0)) for name, x in prompt("llava", Ask(images=0)).inputs.items()}
    with pytest.raises(UserError, match="padding"):
        tiny.model("llava").generate(**inputs, custom_generate=custom_generate(), max_new_tokens=4)


@pytest.mark.parametrize("beams", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_several_answers_are_refused(beams):
    with pytest.raises(UserError, match="one sequence"):
        generate("llava", custom_generate=custom_generate(), **beams)


def test_stateful_processors_are_refused_by_name():
    with pytest.raises(UserError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor"):
        generate("llava", custom_generate=custom_generate(), guidance_scale=1.5)


def test_more_than_token_ids_is_refused_by_name():
    with pytest.raises(UserError, match="return_dict_in_generate"):
        generate("llava", custom_generate=custom_generate(), return_dict_in_generate=True, output_scores=True)


def test_called_without_generate_it_says_how_to_call_it():
    with pytest.raises(UserError, match="custom_generate"):
        custom_generate()(tiny.model("llava"), torch.zeros(1, 1, dtype=torch.long))
