from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForImageTextToText, LlamaConfig
from transformers import logging as transformers_logging
from transformers.models.smolvlm import processing_smolvlm

import tiny
from speculens.conversation import Conversation
from speculens.errors import UserError
from speculens.targets import processing

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)
CHATTING = [family for family in tiny.FAMILIES if tiny.TABLE[family].chat]
TURNS = [(1, 1), (2, 1), (2, 2)]


def encode(family, conversation, processor=None, **options: object):
    processor = processor or tiny.processor(family)
    return processing.encode(processor, tiny.model(family).config, conversation, **options)


def generate(family, inputs, tokens):
    ids = tiny.model(family).generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def picture_rows(family, inputs):
    """How many rows the model's own vision side makes of these pixels."""
    model = tiny.model(family)
    taken = inspect.signature(model.get_image_features).parameters
    features = model.get_image_features(**{k: v for k, v in inputs.items() if k in taken}).pooler_output
    parts = [features] if torch.is_tensor(features) else features
    return sum(part.reshape(-1, part.shape[-1]).shape[0] for part in parts)


# --- encode, on every family


@every_family
@pytest.mark.parametrize(("images", "turns"), TURNS)
def test_the_model_takes_what_encode_gives(family, images, turns):
    inputs, image = tiny.prompt_inputs(family, images, turns)
    ids = inputs["input_ids"]
    assert ids.shape == (1, len(image))
    assert (image.dtype, image.ndim) == (torch.bool, 1)
    assert "labels" not in inputs
    assert int(image.sum()) == picture_rows(family, inputs)
    assert 4 * images <= int(image.sum()) <= 40 * images
    assert tiny.model(family)(**inputs).logits.shape == (1, len(image), len(tiny.tokenizer(family)))
    assert len(generate(family, inputs, 4)) == 4


@pytest.mark.parametrize("family", CHATTING)
def test_a_prompt_without_a_picture(family):
    inputs, image = tiny.prompt_inputs(family, images=0)
    assert not image.any()
    assert not any(name.startswith("pixel") for name in inputs)
    assert len(generate(family, inputs, 4)) == 4


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_paligemma_refuses_a_prompt_without_a_picture(family):
    with pytest.raises(UserError, match="processor refuses this conversation"):
        encode(family, Conversation.user("hello"))


@every_family
def test_each_picture_has_as_many_rows_as_alone(family):
    """Image rows stand where the pictures stood, and a second picture takes none of the first's."""
    if family == "llava_onevision":
        pytest.skip("it splits a lone picture into tiles, but never several")
    one, two = tiny.conversation(images=1), tiny.conversation(images=2)
    second = Conversation.user("x", images=[two.images[1]])
    rows = [int(encode(family, conversation)[1].sum()) for conversation in (one, second, two)]
    assert rows[0] + rows[1] == rows[2]


@every_family
def test_the_picture_matters_and_the_text_is_lively(family):
    """What the other tests rely on: text that repeats itself or ignores its picture would hide mistakes."""
    texts = []
    for seed in range(2):
        inputs, image = encode(family, Conversation.user("What is it?", images=[tiny.picture(seed)]))
        logits = tiny.model(family)(**inputs).logits
        assert 1.5 < logits[0, ~image].std() < 6
        texts.append(generate(family, inputs, 16))
        assert len(set(texts[-1])) >= 8
        assert not set(texts[-1]) & set(tiny.tokenizer(family).all_special_ids) - {tiny.tokenizer(family).bos_token_id}
    assert texts[0] != texts[1]


@pytest.mark.parametrize("family", CHATTING)
def test_the_generation_prompt_is_the_end_of_the_prompt(family):
    conversation = tiny.conversation(images=1, turns=2)
    closed = encode(family, conversation, add_generation_prompt=False)[0]["input_ids"][0].tolist()
    open_end = encode(family, conversation)[0]["input_ids"][0].tolist()
    assert open_end[: len(closed)] == closed
    assert tiny.tokenizer(family).decode(open_end[len(closed) :]) == "ASSISTANT:"


def test_the_text_of_a_conversation_reaches_the_model_in_order():
    conversation = Conversation.user("One?", images=[tiny.picture()]).then("assistant", "Yes.").then("user", "Sure?")
    inputs, image = encode("qwen3_vl", conversation)
    text = tiny.tokenizer("qwen3_vl").decode(inputs["input_ids"][0][~image])
    assert text == ("<s>USER: <|vision_start|><|vision_end|>One?\nASSISTANT: Yes.\nUSER: Sure?\nASSISTANT:")


# --- token types: without them some families go wrong without a word


@every_family
def test_token_types_are_there_where_the_model_takes_them(family):
    inputs, image = tiny.prompt_inputs(family, images=2)
    taken = inspect.signature(tiny.model(family).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        assert (name in inputs) == (name in taken)
    types = inputs.get("mm_token_type_ids", inputs.get("token_type_ids"))
    if types is not None:
        assert torch.equal(types[0] == 1, image & tiny.TABLE[family].chat)  # in PaliGemma, 0 is the prompt


def test_missing_token_types_are_added_and_foreign_inputs_dropped():
    ids = torch.tensor([[1, 2, 3]])
    image = torch.tensor([False, True, False])
    given = {"input_ids": ids, "labels": ids, "rows": [[1]], "token_type_ids": ids, "nonsense": ids}
    fitted = processing._fit(given, tiny.model("qwen2_5_vl").config, image)
    assert sorted(fitted) == ["input_ids", "mm_token_type_ids"]
    assert fitted["mm_token_type_ids"].tolist() == [[0, 1, 0]]


def test_paligemma_reads_its_prompt_both_ways_but_an_answer_forwards():
    asked = Conversation.user("What?", images=[tiny.picture()])
    prompt = encode("paligemma", asked)[0]["input_ids"].shape[1]

    def logits(answer):
        inputs, _ = encode("paligemma", asked.then("assistant", answer), add_generation_prompt=False)
        assert inputs["input_ids"][0, -1] == tiny.tokenizer("paligemma").eos_token_id
        return tiny.model("paligemma")(**inputs).logits[0]

    short, long = logits("Yes"), logits("Yes, it is")
    assert torch.allclose(short[: prompt + 1], long[: prompt + 1], atol=1e-9)


# --- what encode refuses


@pytest.mark.parametrize(
    ("family", "word", "why"),
    [
        ("llava", "<image>", "2 marks '<image>' for 1 pictures"),
        ("qwen2_5_vl", "<|image_pad|>", "2 marks '<|image_pad|>' for 1 pictures"),
        ("qwen2_5_vl", "<|video_pad|>", "reserves for itself"),
        ("gemma3", "<start_of_image>", "2 marks '<start_of_image>' for 1 pictures"),
        ("gemma3", "<image_soft_token>", "reserves for itself"),
        ("paligemma", "<image>", "2 marks '<image>' for 1 pictures"),
    ],
)
def test_a_text_that_spells_out_a_picture_token(family, word, why):
    with pytest.raises(UserError) as caught:
        encode(family, Conversation.user(f"What does {word} mean?", images=[tiny.picture()]))
    assert why in str(caught.value)


def test_a_template_that_leaves_pictures_out():
    processor = copy.copy(tiny.processor("llava"))
    processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(UserError, match="0 marks '<image>' for 1 pictures"):
        encode("llava", tiny.conversation(), processor)


@pytest.mark.parametrize("template", ["{{ raise_exception('Roles must alternate.') }}", "{% if %}", "{{ 1 + 'a' }}"])
def test_a_template_that_refuses(template):
    processor = copy.copy(tiny.processor("llava"))
    processor.chat_template = template
    with pytest.raises(UserError, match="chat template refuses this conversation"):
        encode("llava", tiny.conversation(), processor)


def test_a_processor_of_another_model():
    with pytest.raises(UserError, match="does not fit the model"):
        processing.encode(tiny.processor("llava"), tiny.model("gemma3").config, tiny.conversation())


def test_a_model_that_names_no_image_token():
    with pytest.raises(UserError, match="llama model names no image token"):
        processing.image_token_id(LlamaConfig())


# --- what a tokenizer may have been saved with


def test_a_prompt_is_never_cut_or_padded():
    processor = copy.deepcopy(tiny.processor("llava"))
    processor.tokenizer.init_kwargs |= {"truncation": True, "max_length": 20, "padding": "max_length"}
    for size in (5, 500):
        processor.tokenizer.model_max_length = size
        found, _ = encode("llava", tiny.conversation(turns=2), processor)
        assert torch.equal(found["input_ids"], tiny.prompt_inputs("llava", turns=2)[0]["input_ids"])


@pytest.mark.parametrize("template_writes_bos", [True, False])
def test_the_first_token_is_there_once(template_writes_bos):
    processor = copy.deepcopy(tiny.processor("llava"))
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    if not template_writes_bos:
        processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "")
    ids = encode("llava", tiny.conversation(), processor)[0]["input_ids"][0].tolist()
    assert ids.count(bos) == 1
    assert ids[0] == bos


# --- loading


@every_family
def test_a_saved_model_and_its_processor_come_back(family, tmp_path):
    folder = tiny.save(family, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=tiny.TABLE[family].attention
    )
    processor = processing.load_processor(str(folder), model.config)
    assert processor.chat_template == tiny.processor(family).chat_template
    expected, rows = tiny.prompt_inputs(family, images=2, turns=2)
    found, image = processing.encode(processor, model.config, tiny.conversation(images=2, turns=2))
    assert found.keys() == expected.keys()
    # Where torchvision is installed, the loaded processor resizes with it, a shade differently.
    assert all(torch.allclose(found[name], expected[name], atol=0.1) for name in found)
    assert torch.equal(image, rows)
    with torch.no_grad():
        assert torch.allclose(model(**found).logits, tiny.model(family)(**found).logits, atol=1e-9)


@every_family
def test_the_older_layout_of_files(family, tmp_path):
    """Most published checkpoints have a file for the image processor, and the chat template in JSON."""
    tiny.processor(family).save_pretrained(tmp_path)
    tiny.model(family).config.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "processor_config.json").read_text())
    images = whole.pop("image_processor") | {"processor_class": whole["processor_class"]}
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "processor_config.json").write_text(json.dumps(whole))
    if tiny.TABLE[family].chat:
        (tmp_path / "chat_template.jinja").unlink()
        template = {"chat_template": tiny.processor(family).chat_template}
        (tmp_path / "chat_template.json").write_text(json.dumps(template))
    found, _ = encode(family, tiny.conversation(images=2), load(tmp_path, family))
    expected, _ = tiny.prompt_inputs(family, images=2)
    assert all(torch.allclose(found[name], expected[name], atol=0.1) for name in expected)


def test_smolvlm_without_videos_lays_pictures_out_as_smolvlm_does(monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    ours = tiny.processor("smolvlm")
    kept = {"get_attributes": classmethod(lambda _: ["image_processor", "tokenizer"])}
    whole = type("Whole", (processing_smolvlm.SmolVLMProcessor,), kept)
    theirs = whole(ours.image_processor, ours.tokenizer, None, image_seq_len=ours.image_seq_len)
    text = ours.apply_chat_template(tiny.conversation(images=2, turns=2).to_chat(), add_generation_prompt=True)
    pictures = [[tiny.picture(0), tiny.picture(1, (112, 28))]]
    mine, real = (p(text=[text], images=pictures, return_tensors="pt") for p in (ours, theirs))
    assert mine.keys() == real.keys()
    assert all(torch.equal(mine[name], real[name]) for name in mine)


@pytest.fixture
def llava(tmp_path):
    tiny.processor("llava").save_pretrained(tmp_path)
    tiny.model("llava").config.save_pretrained(tmp_path)
    return tmp_path


def load(folder, family="llava", **options: object):
    return processing.load_processor(str(folder), tiny.model(family).config, **options)


def test_a_processor_without_a_chat_template(llava):
    (llava / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template, neither in its processor nor in its tokenizer"):
        load(llava)
    given = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] or '<image>' }}{% endfor %}{% endfor %}"
    inputs, image = encode("llava", tiny.conversation(), load(llava, chat_template=given))
    assert int(image.sum()) == 4
    assert len(inputs["input_ids"][0]) > 4
    processor = copy.copy(tiny.processor("llava"))
    processor.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        encode("llava", tiny.conversation(), processor)


def test_the_tokenizers_chat_template_is_the_fallback(llava):
    (llava / "chat_template.jinja").unlink()
    path = llava / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "plain"}))
    assert load(llava).chat_template == "plain"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_folders_without_a_processor(tmp_path, family):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match="has no usable processor for a") as caught:
            load(folder, family)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_text_model_has_no_processor_for_pictures(tmp_path):
    tiny.tokenizer("llava").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"  # which remembers the processor that it was a part of
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": None}))
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="so it is no vision-language model"):
        processing.load_processor(str(tmp_path), LlamaConfig())


def test_the_librarys_voice_is_given_back():
    before = transformers_logging.get_verbosity()
    tiny.prompt_inputs("llava")
    with pytest.raises(UserError):
        encode("paligemma", Conversation.user("hello"))
    assert transformers_logging.get_verbosity() == before
