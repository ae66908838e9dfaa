"""Widening changes what a model costs and nothing that it says; drafters draft the same trees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from benchmarks.widen import SEVEN_B, Residual, blocks, heads, larger, widen_drafter, widen_target
from testbed import models
from torch import Tensor

import tiny
from speculens import Conversation, Engine, NoDrafter, Sampling, Target, load_drafter, load_target
from speculens.drafters import METHODS, Drafter, DrafterConfig
from speculens.features import Features
from speculens.tree import TreeShape

FAMILIES = sorted(models.FAMILIES)
PROMPTS = [Conversation.user("Describe it.", images=[tiny.picture(1)]), Conversation.user("And the gap?", images=[])]
SAMPLING = Sampling(max_new_tokens=6, ignore_eos=True)
# Every part that a method can have, in its least usual form.
DRAFTERS: Mapping[str, dict[str, Any]] = {
    "eaglevlm": {},
    "hivis": {},
    "vispec": {"num_q": 3},
    "vispec added": {"num_q": 2, "fusion": "add", "adaptor_heads": 1, "adaptor_head_dim": 8},
    "vispec bare": {"fusion": "none"},
    "specvlm": {"mode": "select", "resample_width": 16, "gate_width": 8},
    "specvlm weighted": {"mode": "weighted"},
    "specvlm concat": {"mode": "concat", "depthwise": True, "keep": "norm"},
}


@functools.cache
def pair(family: str) -> tuple[Target, Target]:
    """A random small target with weights large enough for every part to matter, and the wide one."""
    torch.manual_seed(0)
    model = models.initialise(models.build(family, models.TINY)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.ndim > 1 else weight.add_(0.3 * torch.randn_like(weight))
    small = Target(model, load_target(f"testbed/weights/{family}").processor)
    return small, widen_target(small, larger(small), device="cpu", dtype=torch.float64)


def random_drafter(name: str, target: Target) -> Drafter:
    method = METHODS[name.partition(" ")[0]]
    config = DrafterConfig(
        speculator_type=method.name,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
        target_family=target.family,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rms_norm_eps=1e-5,
        qkv_bias=True,
        input_norm=not name.endswith("bare"),
        tree=TreeShape(num_steps=2, topk=3, num_draft_tokens=9),
        options=method.settle(DRAFTERS[name], target.model.config),
    )
    torch.manual_seed(1)
    drafter = method(config).double()
    for weight in drafter.parameters():
        weight.data.add_(0.2 * torch.randn_like(weight))
    return drafter.eval().requires_grad_(False)


def transcript(target: Target, drafter: Drafter, prompt: Conversation) -> list[tuple[Any, ...]]:
    """All that a run shows: what was emitted, what was drafted, how much of it was accepted."""
    steps = Engine(target, drafter).stream(prompt, SAMPLING)
    return [(step.tokens, step.accepted, None if step.tree is None else step.tree.tokens.tolist()) for step in steps]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_target_says_the_same(family: str) -> None:
    small, wide = pair(family)
    for prompt in PROMPTS:
        assert transcript(small, NoDrafter(), prompt) == transcript(wide, NoDrafter(), prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_says_the_same_of_it(family: str) -> None:
    """The wide model is an ordinary one: its own `generate` agrees, and no token that was added can be sampled."""
    small, wide = pair(family)
    inputs = wide.encode(PROMPTS[0]).inputs
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    ids = [target.model.generate(**inputs, max_new_tokens=8, eos_token_id=-1) for target in (small, wide)]
    assert torch.equal(*ids)
    logits, low = wide.model(**inputs).logits.float().split([small.vocab_size, 64], -1)
    torch.testing.assert_close(logits, small.model(**inputs).logits.float(), atol=1e-3, rtol=0)
    assert low.max() < -1e6


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_drafter_drafts_the_same(family: str, name: str) -> None:
    """Over the prompt and then on its own output; to float32's accuracy, which the targets' norms have in any dtype."""
    small, wide = pair(family)
    drafter = random_drafter(name, small)
    for number in range(len(PROMPTS)):
        one, other = (guesses(*made, number) for made in ((small, drafter), (wide, widen_drafter(drafter, wide))))
        assert one.std() > 1
        torch.testing.assert_close(other[..., : small.vocab_size], one, atol=1e-4 * float(one.std()), rtol=0)
        assert other[..., small.vocab_size :].max() < -1e6


def guesses(target: Target, drafter: Any, number: int) -> Tensor:
    """The drafter's logits over its view of a prompt, then over the same rows with its own output as features."""
    features = prefilled(target, number)
    next_embeds = torch.cat([features.embeds[:, 1:], features.embeds[:, -1:]], 1)
    rows = drafter.view(features, next_embeds)
    output = drafter(rows)
    again = drafter(dataclasses.replace(rows, hidden=output, direct=None), step=1)
    return target.logits(torch.cat([output, again]))


@functools.cache
def prefilled(target: Target, number: int) -> Features:
    return target.session(1, 600).prefill(target.encode(PROMPTS[number]))[1]


def test_trained_weights_accept_the_same() -> None:
    small = load_target("testbed/weights/llava", dtype=torch.float32)
    drafter = load_drafter("testbed/weights/llava-eaglevlm", dtype=torch.float32)
    shape = dataclasses.replace(larger(small), layers=17, heads=3, kv_heads=3)
    wide = widen_target(small, shape, device="cpu", dtype=torch.float32)
    prompt = Conversation.user("Write the data as a markdown table with ranks.", images=[])
    drafts = transcript(small, drafter, prompt)
    assert drafts == transcript(wide, widen_drafter(drafter, wide), prompt)
    assert any(accepted for _, accepted, _ in drafts)


@pytest.mark.parametrize("family", FAMILIES)
def test_added_channels_and_heads_stay_silent(family: str) -> None:
    """What was not in the small model gives exactly 0, though its weights are random numbers."""
    small, wide = pair(family)
    seen = []
    handles = [
        layer.register_forward_hook(lambda _module, _args, out: seen.append(out)) for layer in wide.decoder.layers
    ]
    prompt = wide.encode(PROMPTS[0])
    wide.teach(prompt.inputs, prompt.image[None])
    for handle in handles:
        handle.remove()
    residual = Residual(small.hidden_size, wide.hidden_size, 1e-5)
    dead = torch.ones(wide.hidden_size, dtype=torch.bool)
    dead[residual.stream.live] = False
    assert len(seen) == small.num_layers + 2
    for rows in seen:
        assert dead.sum() == 3 * small.hidden_size - 1
        assert not rows[..., dead].any()
        assert (rows[..., residual.constant] == rows[0, 0, -1]).all()
    assert torch.equal(seen[-1], seen[-3])  # added layers do nothing
    layer = wide.decoder.layers[-1]
    for weight in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight, layer.mlp.up_proj.weight):
        assert (weight != 0).double().mean() > 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_a_7b_fits(family: str) -> None:
    shape = SEVEN_B[family]
    factors = blocks(256, shape.hidden)
    assert sum(factor**2 for factor in factors) * 256 == shape.hidden
    assert factors[0] == 1
    queries, keys = heads((2, 1), (shape.heads, shape.kv_heads), 128)
    group = shape.heads // shape.kv_heads
    for query in queries.read.view(2, 128):
        assert any(int(query[0]) // 128 // group == int(index[0]) // 128 for index, _ in keys.copies)


def test_a_width_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit in 1024"):
        blocks(256, 1024)
