"""A vision tower's attention over all segments at once equals its own, segment by segment."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

import tiny
from speculens.targets import Target, segments
from speculens.targets.segments import NAME, join_segments, segmented_attention
from speculens.training.batches import Encoder, collate

SEGMENTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def towers(model):
    return [one for one in model.modules() if getattr(getattr(one, "config", None), "_attn_implementation", "") == NAME]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pictures_are_seen_as_before(family):
    model = copy.deepcopy(tiny.model(family, torch.float64))
    target = Target(model, tiny.processor(family))
    prompt = target.encode(tiny.conversation(family, images=2))
    before = target.at_the_door(prompt.inputs, None)["inputs_embeds"]
    join_segments(model)
    assert bool(towers(model)) == (family in SEGMENTED)
    torch.testing.assert_close(target.at_the_door(prompt.inputs, None)["inputs_embeds"], before, rtol=0, atol=1e-12)


def test_rows_see_their_own_segment_alone():
    """Of lengths 3, 5, 3: each segment by itself gives the same, in its own place."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 11, 4, dtype=torch.float64)
    bounds = [0, 3, 8, 11]
    mixed, _ = segmented_attention(torch.nn.Identity(), query, key, value, cu_seq_lens_q=torch.tensor(bounds))
    for start, end in pairwise(bounds):
        parts = (states[:, :, start:end] for states in (query, key, value))
        alone = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)
        torch.testing.assert_close(mixed[:, start:end], alone)


def test_another_attention_is_left_alone():
    model = copy.deepcopy(tiny.model("qwen2_5_vl", torch.float64))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "eager"
    join_segments(model)
    assert not towers(model)


@pytest.mark.parametrize("family", SEGMENTED)
def test_positions_made_on_the_host_are_the_models_own(family, monkeypatch):
    """Rows of different pictures and lengths, padded on the right."""
    target = Target(tiny.model(family, torch.float64), tiny.processor(family))
    encoder = Encoder(target, 4096)
    asked = [tiny.conversation(family, images=count, seed=count) for count in (1, 2)]
    rows = [encoder.row(one.then("assistant", "Two circles. " * (3 - i))) for i, one in enumerate(asked)]
    batch = collate(rows, 0, torch.float64)
    made = target.teach(batch.inputs, batch.image).hidden
    assert target.positions(batch.inputs)
    monkeypatch.setattr(Target, "positions", lambda *_: {})
    own = target.teach(batch.inputs, batch.image).hidden
    real = batch.inputs["attention_mask"].bool()
    assert torch.equal(made[real], own[real])


@pytest.mark.parametrize("family", SEGMENTED)
def test_sizes_that_come_again_are_laid_out_once(family, monkeypatch):
    """The host's share of a prompt; what was kept of one picture must not serve another of a different size."""
    model = copy.deepcopy(tiny.model(family, torch.float64))
    join_segments(model)
    target = Target(model, tiny.processor(family))
    monkeypatch.setattr(segments, "MOST_SIZES", 2)
    made = []
    own = segments.layout
    monkeypatch.setattr(segments, "layout", lambda tower, grid, device: made.append(grid) or own(tower, grid, device))
    prompts = [target.encode(tiny.conversation(family, images=count)) for count in (1, 2, 3)]

    def embeds(which):
        return target.at_the_door(prompts[which].inputs, None)["inputs_embeds"]

    first = [embeds(which) for which in (0, 1)]
    assert all(torch.equal(embeds(which), first[which]) for which in (0, 1, 0))
    assert len(made) == 2
    embeds(2)  # one too many: the second prompt's is the oldest
    assert torch.equal(embeds(0), first[0]) and len(made) == 3
    assert torch.equal(embeds(1), first[1]) and len(made) == 4


@pytest.mark.parametrize("family", SEGMENTED)
def test_sizes_first_seen_in_inference_mode_may_be_learnt_from_later(family):
    model = copy.deepcopy(tiny.model(family, torch.float64))
    join_segments(model)
    prompt = Target(model, tiny.processor(family)).encode(tiny.conversation(family, images=1))
    with torch.inference_mode():
        model(**prompt.inputs)
    model.requires_grad_(True)
    model(**prompt.inputs).logits.sum().backward()
    entries = [tower.patch_embed.proj for tower in towers(model) if hasattr(tower, "patch_embed")]
    assert entries and all(entry.weight.grad is not None for entry in entries)
