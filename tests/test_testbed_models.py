"""The testbed's models: size, saving, and that training computes what the models compute."""

import argparse

import numpy as np
import pytest
import torch
from testbed import draw, feed, models, optim, tokenizer, train
from testbed.forward import forward_of, llava_patches, qwen_patches
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

FAMILIES = sorted(models.FAMILIES)


@pytest.fixture(scope="module")
def cores() -> dict[str, Tokenizer]:
    return {
        family: tokenizer.build(folder=None, specials=of.specials, samples=200)
        for family, of in models.FAMILIES.items()
    }


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.nn.Module]:
    """Random models with weights large enough for every part to matter."""
    made = {}
    for family in FAMILIES:
        torch.manual_seed(0)
        made[family] = models.initialise(models.build(family, models.TINY)).eval()
        with torch.no_grad():
            for weight in made[family].parameters():
                weight.mul_(4) if weight.ndim > 1 else weight.add_(0.3 * torch.randn_like(weight))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_model_fits_in_18_megabytes(family: str) -> None:
    with torch.device("meta"):
        model = models.build(family)
    count = sum(weight.numel() for weight in model.parameters())  # tied weights once
    assert count <= 9_000_000
    assert 2 * count + 100_000 <= 18_000_000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", draw.SIZES)
def test_training_computes_what_the_model_does(
    family: str, size: tuple[int, int], cores: dict[str, Tokenizer], tiny: dict[str, torch.nn.Module]
) -> None:
    if family == "llava" and size != (models.SIDE, models.SIDE):
        pytest.skip("LLaVA pictures have one size")
    made, model, writer = models.processor(family, cores[family]), tiny[family], feed.Writer(family, cores[family])
    samples = [draw.sample(1, index, size) for index in range(2)]
    rows = writer.rows(
        [np.asarray(one.image) for one in samples],
        [one.question for one in samples],
        [one.answer for one in samples],
    )
    piece = writer.piece("drawn", rows)
    fast = forward_of(model, len(writer.before), torch.float32, compiled=False)
    with torch.no_grad():
        ours = fast.logits(fast.hidden(piece.pixels, piece.ids.long()))
    for number, (one, row) in enumerate(zip(samples, rows, strict=True)):
        chat = [
            {
                "role": "user",
                "content": [{"type": "image", "image": one.image}, {"type": "text", "text": one.question}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": one.answer}]},
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = made.apply_chat_template(chat[:1], add_generation_prompt=True, **options)["input_ids"][0]
        whole = made.apply_chat_template(chat, **options)
        assert prompt.tolist() == row.ids[: row.start]
        assert whole["input_ids"][0, : len(row.ids)].tolist() == row.ids
        with torch.no_grad():
            theirs = model(**whole).logits[0, : len(row.ids)]
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours[number, : len(row.ids)], theirs, atol=1e-4, rtol=0)
    if family == "llava":
        side = models.TOKEN_PIXELS
        cut = torch.nn.functional.unfold(whole["pixel_values"], side, stride=side).mT
        torch.testing.assert_close(llava_patches(piece.pixels[1:]), cut, atol=1e-5, rtol=0)
    else:
        frames = whole["pixel_values"].view(-1, 3, 2, 64)
        torch.testing.assert_close(qwen_patches(piece.pixels[1:])[0], frames[:, :, 0].flatten(1), atol=1e-5, rtol=0)
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])


def test_a_window_of_the_tiny_model_is_padded(tiny: dict[str, torch.nn.Module]) -> None:
    fast = forward_of(tiny["qwen2_5_vl"], 5, torch.float32, compiled=False)
    assert fast.layout(224, 288)[-1] is not None
    assert fast.layout(256, 256)[-1] is None
    assert len(tiny["qwen2_5_vl"].config.vision_config.fullatt_block_indexes) < models.TINY.vision_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_as_it_was_saved(
    family: str, cores: dict[str, Tokenizer], tiny: dict[str, torch.nn.Module], tmp_path: object
) -> None:
    made = models.processor(family, cores[family])
    models.save(tiny[family], made, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert tiny[family].dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, value in tiny[family].state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name
    end = made.tokenizer.convert_tokens_to_ids(models.FAMILIES[family].end)
    assert model.generation_config.eos_token_id == end
    assert not model.generation_config.do_sample
    again = models.load_processor(tmp_path)
    sample = draw.sample(1, 0)
    text = made.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}],
        add_generation_prompt=True,
    )
    one, other = (p(text=text, images=sample.image, return_tensors="pt") for p in (made, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    if family == "llava":  # the Qwen one needs torchvision in its full form
        assert AutoProcessor.from_pretrained(tmp_path).chat_template == made.chat_template


def test_batches_do_not_repeat_between_runs_and_have_all_sources(cores: dict[str, Tokenizer]) -> None:
    mixture = feed.Mixture(batch=4, pieces=2, real=0, prose=0)
    first, again, later = (next(iter(feed.Feed("llava", cores["llava"], None, mixture, run))) for run in (0, 0, 1))
    assert torch.equal(first[0].ids, again[0].ids)
    assert torch.equal(first[0].pixels, again[0].pixels)
    assert not any(torch.equal(one, other) for one in first[0].pixels for other in later[0].pixels)
    piece = first[0]
    wanted = piece.ids.flatten()[piece.targets.long()]
    end, pad = (cores["llava"].token_to_id(name) for name in ("</s>", "<pad>"))
    assert (wanted == end).sum() == 2
    assert (wanted != pad).all()


def test_muon_steps_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    made = optim.orthogonal(torch.randn(3, 16, 48)).float()
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_the_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    at = [train.pace(train.Progress(seconds=second), 1000.0) for second in (0, 10, 100, 500, 775, 1000)]
    assert at[0] < 0.1
    assert at[1] == pytest.approx(0.525)
    assert at[2] == at[3] == 1.0
    assert at[4] == pytest.approx(0.5)
    assert at[5] == 0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_few_steps_learn_a_batch_and_resume_exactly(
    optimizer: str, cores: dict[str, Tokenizer], tmp_path: object
) -> None:
    options = argparse.Namespace(family="llava", tiny=True, compile=False, optimizer=optimizer, lr=2e-3, matrix_lr=4e-3)
    batch = next(iter(feed.Feed("llava", cores["llava"], None, feed.Mixture(2, 1, 0, 0))))
    one = train.Trainer(options, cores["llava"], train.Progress(), "cpu")
    before = one.loss(batch[0])[0].item()
    for _ in range(8):
        one.step(batch, 1.0)
    assert one.loss(batch[0])[0].item() < 0.9 * before
    one.save(tmp_path / "state.pt")
    two = train.Trainer(options, cores["llava"], train.Progress(), "cpu")
    two.restore(tmp_path)
    for trainer in (one, two):
        trainer.step(batch, 1.0)
    assert one.loss(batch[0])[0].item() == two.loss(batch[0])[0].item()
