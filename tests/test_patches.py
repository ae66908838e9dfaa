"""Patches embedded by a product are those that the tower's own convolution embeds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiny
from speculens.targets import Target
from speculens.targets.patches import PatchEmbedding, multiply_patches


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_are_seen_as_before(family, monkeypatch):
    model = copy.deepcopy(tiny.model(family, torch.float64))
    target = Target(model, tiny.processor(family))
    prompt = target.encode(tiny.conversation(family, images=2))
    before = target.at_the_door(prompt.inputs, None)["inputs_embeds"]
    multiply_patches(model)
    monkeypatch.setattr(nn.Conv3d, "forward", None)  # calling it would fail: the product is what serves
    torch.testing.assert_close(target.at_the_door(prompt.inputs, None)["inputs_embeds"], before, rtol=0, atol=1e-12)


def test_a_larger_input_is_convolved():
    own = nn.Conv3d(2, 3, kernel_size=(1, 2, 2), dtype=torch.float64)
    ours = copy.deepcopy(own)
    multiply_patches(ours)
    volume = torch.randn(1, 2, 2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(volume), own(volume))
    torch.testing.assert_close(ours(volume[:, :, :1, :2, :2]), own(volume[:, :, :1, :2, :2]))


@pytest.mark.parametrize("changes", [{"padding": 1}, {"dilation": 2}, {"groups": 2}])
def test_other_convolutions_are_left_alone(changes):
    module = nn.Conv3d(2, 4, kernel_size=2, **changes)
    multiply_patches(module)
    assert not isinstance(module, PatchEmbedding)
