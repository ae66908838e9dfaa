"""HiViS against its formulas written out token by token, its border rules on drawn examples, and exact decoding."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from oracle import Ask, assert_exact, prompt, target
from speculens.checkpoints import load_drafter, save_drafter
from speculens.drafters import DrafterConfig, HivisDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.features import Features
from speculens.sampling import Sampling
from speculens.training.config import DrafterRecipe
from speculens.training.student import make_drafter
from speculens.tree import TreeShape

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
START, END, PICTURE, TEXT = 1, 2, 3, 10  # token ids of the drawn examples; text tokens are TEXT, TEXT + 1, ..
# Two pictures with frames, text before, between and behind; letters name the text tokens.
DRAWN = "a b < * * * > c d < * > e"
CHOICES = [(border, positions) for border in ("paper", "after", "vllm") for positions in ("contiguous", "original")]


def hivis(family: str, seed: int = 0, **options: Any) -> HivisDrafter:
    """Random weights in float64, a small tree."""
    torch.manual_seed(seed)
    tree = TreeShape(num_steps=3, topk=3, num_draft_tokens=12)
    recipe = DrafterRecipe("hivis", intermediate_size=96, tree=tree, options=options)
    drafter = make_drafter(recipe, target(family)).to(torch.float64)
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return drafter.eval().requires_grad_(False)


def drawn(*pictures: str) -> tuple[Features, Tensor]:
    """Features whose embedding of token i is i + 1 and whose feature is -(i + 1), so that rows can be read off.

    The token behind each sequence has the embedding of its number, as any other.
    """
    rows = [picture.split() for picture in pictures]
    lengths = torch.tensor([len(row) for row in rows])
    n = int(lengths.max())
    ids = {"<": START, ">": END, "*": PICTURE}
    tokens = torch.zeros(len(rows), n, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor([ids.get(mark, TEXT) for mark in row])
    number = torch.arange(1, n + 1).expand(len(rows), -1)
    embeds = number[..., None].double()
    features = Features(tokens, -embeds, embeds, number - 1, tokens == PICTURE, lengths)
    return features, embeds + 1


def pairs(features: Features, next_embeds: Tensor, **options: Any) -> list[list[tuple[int, int, int, int]]]:
    """Of each sequence, (token of the embedding, token of the feature, position, slot) of its rows."""
    drafter = HivisDrafter(make_config(**options))
    rows = drafter.view(features, next_embeds)
    columns = (rows.embeds[..., 0] - 1, -rows.hidden[..., 0] - 1, rows.positions, rows.source)
    return [
        [tuple(int(column[i, j]) for column in columns) for j in range(rows.source.shape[1]) if rows.source[i, j] >= 0]
        for i in range(len(rows.source))
    ]


def make_config(**options: Any) -> DrafterConfig:
    return DrafterConfig("hivis", 1, 9, "drawn", 1, 1, 1, 2, options={"frame": [START, END]} | options)


# --- the view


@pytest.mark.parametrize(
    ("border", "kept"),
    [
        # a0 b1 <2 *3 *4 *5 >6 c7 d8 <9 *10 >11 e12; the token behind the sequence is 13
        ("paper", [(1, 0), (7, 1), (8, 7), (12, 8), (13, 12)]),
        ("after", [(1, 0), (8, 1), (13, 8)]),  # c and e stand behind a frame
        ("vllm", [(1, 0), (2, 1), (6, 5), (7, 6), (8, 7), (9, 8), (11, 10), (12, 11), (13, 12)]),
    ],
)
def test_each_border_rule_on_a_drawn_sequence(border, kept):
    (got,) = pairs(*drawn(DRAWN), border=border, positions="contiguous")
    assert got == [(e, f, j, e - 1) for j, (e, f) in enumerate(kept)]
    (got,) = pairs(*drawn(DRAWN), border=border, positions="original")
    assert got == [(e, f, f, e - 1) for e, f in kept]


def test_without_a_frame_its_tokens_are_text():
    (got,) = pairs(*drawn(DRAWN), border="paper", frame=[])
    assert [f for _, f, _, _ in got] == [0, 1, 2, 6, 7, 8, 9, 11, 12]
    assert pairs(*drawn("a < * b"), border="paper", frame=[]) == pairs(*drawn("a < * b"), border="after", frame=[])


def test_a_frame_without_a_picture_is_text():
    (got,) = pairs(*drawn("a < > b < c"), border="after")
    assert [f for _, f, _, _ in got] == list(range(6))


@pytest.mark.parametrize(("border", "positions"), CHOICES)
def test_a_ragged_batch_is_its_sequences_alone(border, positions):
    """Also with no picture, a picture first, a picture last, nothing but a picture, and pictures side by side."""
    sequences = [DRAWN, "a b c", "< * * > a b", "a b < * >", "* * *", "*", "a < * > < * > b c"]
    together = pairs(*drawn(*sequences), border=border, positions=positions)
    for sequence, got in zip(sequences, together, strict=True):
        assert pairs(*drawn(sequence), border=border, positions=positions) == [got]
        length = len(sequence.split())
        assert got[-1][0] == length  # the last row holds the token behind the sequence
        assert [row[3] for row in got] == sorted({row[3] for row in got})


@pytest.mark.parametrize(("border", "positions"), CHOICES)
def test_the_view_of_a_beginning_is_the_beginning_of_the_view(border, positions):
    """Training reads whole texts, decoding their prompts: behind the last picture the rows must be the same."""
    whole = "a < * * > b c d e"
    (long,) = pairs(*drawn(whole), border=border, positions=positions)
    for count in (6, 7, 8):
        (short,) = pairs(*drawn(" ".join(whole.split()[:count])), border=border, positions=positions)
        assert short == long[: len(short)]


def test_two_frames_side_by_side_are_hidden_together():
    (got,) = pairs(*drawn("a < * > < * > b c"), border="paper")
    assert [(e, f) for e, f, _, _ in got] == [(7, 0), (8, 7), (9, 8)]


# --- the whole drafter against plain tensors


def visual(features: Features, sequence: int, frame: tuple[int, ...], border: str) -> list[bool]:
    """Which tokens count as picture, in words: rows of the picture; paper: its frame too; after: one more behind."""
    n = int(features.lengths[sequence])
    image = features.image[sequence].tolist()
    ids = features.tokens[sequence].tolist()
    found = list(image)
    if border != "vllm" and frame:
        for i in range(n):
            if ids[i] == frame[0] and i + 1 < n and image[i + 1]:
                found[i] = True
            if ids[i] == frame[1] and i and image[i - 1]:
                found[i] = True
                if border == "after" and i + 1 < n:
                    found[i + 1] = True
    return found[:n]


def reference(
    drafter: HivisDrafter, features: Features, next_embeds: Tensor, sequence: int, border: str, positions: str
) -> Tensor:
    """f̂ of all rows of one sequence (m, H): h = fc([e ; f ; r_0]), attention row by row, SwiGLU; no final norm."""
    config, weights = drafter.config, dict(drafter.named_parameters())
    n = int(features.lengths[sequence])
    hidden = visual(features, sequence, drafter.options.frame, border)
    after = [*(embed for embed in next_embeds[sequence, :n])]  # of token i + 1
    if border == "vllm":
        slots = [(i, i) for i in range(n) if i == n - 1 or not hidden[i + 1]]
    else:
        text = [i for i in range(n) if not hidden[i]]
        slots = [(i, j - 1) for i, j in zip(text, [*text[1:], n], strict=True)]
    inputs = torch.stack(
        [torch.cat([after[e], features.hidden[sequence, f], weights["residual"][0]]) for f, e in slots]
    )
    x = inputs @ weights["fc.weight"].T + weights["fc.bias"]
    place = [f for f, _ in slots] if positions == "original" else list(range(len(slots)))

    def norm(v: Tensor, name: str) -> Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"layers.0.{name}.weight"]

    def linear(v: Tensor, name: str) -> Tensor:
        bias = weights.get(f"layers.0.{name}.bias")
        return v @ weights[f"layers.0.{name}.weight"].T + (0 if bias is None else bias)

    def heads(v: Tensor) -> list[Tensor]:
        return list(v.split(config.head_dim, dim=-1))

    def turned(v: Tensor) -> Tensor:
        half = config.head_dim // 2
        rows = []
        for row, position in zip(v, place, strict=True):
            pair = torch.complex(row[:half], row[half:])
            angle = torch.tensor(
                [position * config.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64
            )
            pair = pair * torch.polar(torch.ones_like(angle), angle)
            rows.append(torch.cat([pair.real, pair.imag]))
        return torch.stack(rows)

    inner = norm(x, "input_layernorm")
    queries, keys, values = (heads(linear(inner, f"self_attn.{name}_proj")) for name in "qkv")
    group = len(queries) // len(keys)
    mixed = []
    for number, query in enumerate(queries):
        key, value = turned(keys[number // group]), values[number // group]
        scores = turned(query) @ key.T / math.sqrt(config.head_dim)
        ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
        mixed.append(scores.masked_fill(ahead, -math.inf).softmax(-1) @ value)
    x = x + linear(torch.cat(mixed, -1), "self_attn.o_proj")
    inner = norm(x, "post_attention_layernorm")
    gate = linear(inner, "mlp.gate_proj")
    return x + linear(gate * gate.sigmoid() * linear(inner, "mlp.up_proj"), "mlp.down_proj")


@functools.cache
def taught(family: str) -> Features:
    """Prompts with one picture, three pictures and two turns, and none: a ragged batch."""
    prompts = [prompt(family, ask) for ask in (Ask(), Ask(images=3, turns=2, seed=1), Ask(images=0, seed=2))]
    alone = [target(family).teach(dict(one.inputs), one.image[None]) for one in prompts]
    n = max(int(one.lengths) for one in alone)

    def padded(name: str) -> Tensor:
        parts = [getattr(one, name)[0] for one in alone]
        return torch.stack([torch.cat([x, x.new_ones(n - len(x), *x.shape[1:])]) for x in parts])

    names = ("tokens", "hidden", "embeds", "image")
    where = torch.arange(n).expand(3, -1)
    lengths = torch.cat([one.lengths for one in alone])
    tokens, hidden, embeds, image = (padded(name) for name in names)
    return Features(tokens, hidden, embeds, where, image, lengths)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("border", "positions"), CHOICES)
def test_the_forward_is_the_papers_formula(family, border, positions):
    drafter, features = hivis(family, border=border, positions=positions), taught(family)
    next_embeds = torch.cat([features.embeds[:, 1:], torch.ones_like(features.embeds[:, :1])], 1)
    rows = drafter.view(features, next_embeds)
    output = drafter(rows)
    for sequence in range(3):
        expected = reference(drafter, features, next_embeds, sequence, border, positions)
        assert len(expected) == int((rows.source[sequence] >= 0).sum())
        # RoPE's angles are float32 in the drafter, as in the targets.
        torch.testing.assert_close(output[sequence, : len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_each_step_has_its_own_embedding_and_the_last_one_stays():
    drafter, features = hivis("llava", steps=2), taught("llava")
    rows = drafter.view(features, features.embeds)
    plain = torch.cat([rows.embeds, rows.hidden], -1)
    size = rows.hidden.shape[-1]
    for step, used in ((0, 0), (1, 1), (2, 1), (7, 1)):
        moved = drafter.residual[used] @ drafter.fc.weight[:, 2 * size :].T
        expected = plain @ drafter.fc.weight[:, : 2 * size].T + drafter.fc.bias + moved
        torch.testing.assert_close(drafter.enter(rows, step), expected)


def test_without_step_embeddings_it_is_eagles_fc():
    drafter = hivis("llava", step_embedding=False)
    assert drafter.fc.in_features == 2 * target("llava").hidden_size
    assert "residual" not in dict(drafter.named_parameters())
    rows = drafter.view(taught("llava"), taught("llava").embeds)
    assert torch.equal(drafter.enter(rows, 0), drafter.enter(rows, 2))


# --- decoding


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("border", ["after", "vllm"])
def test_decoding_is_exact(family, border):
    """One picture, several, none, several turns; two slots, admitted and freed at different steps."""
    asks = [Ask(), Ask(images=2, seed=1), Ask(images=0, seed=3), Ask(images=3, turns=3, seed=2)]
    samplings = [Sampling(max_new_tokens=length) for length in (14, 9, 12, 10)]
    assert_exact(family, hivis(family, border=border), asks, samplings)


def test_its_prefill_is_the_text():
    features = taught("llava")
    rows = hivis("llava").view(features, features.embeds)
    text = (~features.image & (features.positions < features.lengths[:, None])).sum(1)
    assert torch.equal((rows.source >= 0).sum(1), text)


def test_its_prefill_is_told_with_the_statistics():
    asked = prompt("llava", Ask(images=2))
    engine = Engine(target("llava"), hivis("llava"), capacity=300)
    stats = engine.generate(asked, Sampling(max_new_tokens=2)).stats
    visual = int(asked.image.sum())
    assert (stats.num_prompt_tokens, stats.num_visual_tokens) == (len(asked), visual)
    assert stats.drafter_prefill_ratio == (len(asked) - visual) / len(asked)


# --- options


def test_the_target_decides_what_auto_means():
    llava, qwen, gemma = (hivis(family).options for family in FAMILIES)
    assert (llava.positions, llava.frame) == ("contiguous", ())
    words = tiny.tokenizer("qwen2_5_vl")
    frame = words.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    assert (qwen.positions, list(qwen.frame)) == ("original", frame)
    assert gemma.positions == "contiguous"
    assert len(gemma.frame) == 2
    assert hivis("qwen2_5_vl", positions="contiguous").options.positions == "contiguous"


def test_a_saved_drafter_is_the_same(tmp_path):
    drafter = hivis("qwen2_5_vl", border="after")
    again = load_drafter(save_drafter(drafter, tmp_path))
    assert isinstance(again, HivisDrafter)
    assert again.options == drafter.options
    assert all(torch.equal(weight.float(), again.state_dict()[name]) for name, weight in drafter.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boarder": "paper"}, "unknown key boarder; did you mean border"),
        ({"border": "none"}, "border of HiViS is one of paper, after, vllm, not none"),
        ({"positions": "none"}, "positions of HiViS is one of"),
        ({"frame": [1]}, "two token ids or none"),
        ({"steps": 0}, "whole number above 0"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(UserError, match=said):
        HivisDrafter(make_config(**options))
