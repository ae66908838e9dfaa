"""ViSpec: what enters its layer, against the paper's formulas row by row; and decoding with it, which stays exact."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import tiny
from oracle import target
from speculens.checkpoints import load_drafter
from speculens.conversation import Conversation, Message
from speculens.drafters import DrafterConfig
from speculens.drafters.vispec import ViSpecDrafter
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.features import Features
from speculens.sampling import Sampling
from speculens.training import train
from speculens.tree import TreeShape
from test_training import answered, events_of, recipe, speaker

H, HEADS, THETA, EPS = 64, 4, 10000.0, 1e-6
TREE = TreeShape(num_steps=2, topk=3, num_draft_tokens=9)
OPTIONS = [
    {},
    {"num_q": 1},
    {"num_q": 4},
    {"adaptor_heads": 1, "adaptor_head_dim": 24},
    {"fusion": "add"},
    {"fusion": "none"},
]
# Image rows of a prompt: one picture, none, several (two side by side), at the very start, shorter than num_q - 1.
PROMPTS = {
    "one": "ttiiiiiittt",
    "none": "tttttt",
    "several": "tiiiittiiitttiiiiiittt",
    "no text between": "ttiiiiiiiitt",
    "first": "iiiitttt",
    "short": "ttittiitttt",
}


def config(made_for=None, options: dict | None = None, *, bias=False) -> DrafterConfig:
    return DrafterConfig(
        speculator_type="vispec",
        target_hidden_size=H,
        target_vocab_size=made_for.vocab_size if made_for else 50,
        target_family=made_for.family if made_for else "llava",
        intermediate_size=96,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=H // HEADS,
        image_contract="adaptor",
        qkv_bias=bias,
        input_norm=False,
        tree=TREE,
        options=options or {},
    )


@torch.no_grad()
def randomised(drafter: ViSpecDrafter, seed: int = 0) -> ViSpecDrafter:
    """Random weights everywhere, also where training would begin with an identity."""
    generator = torch.Generator().manual_seed(seed)
    for weight in drafter.parameters():
        scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return drafter.eval().requires_grad_(False)


@functools.cache
def random_vispec(family: str) -> ViSpecDrafter:
    return randomised(ViSpecDrafter(config(target(family))).to(target(family).dtype))


def features_of(prompts: list[str], seed: int = 0) -> tuple[Features, torch.Tensor]:
    """Random features of prompts written as t (text) and i (image row), and the embeddings of the tokens after them."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(len, prompts)) + (len(prompts) > 1)  # a batch has padding in every row
    hidden, embeds = (torch.randn(2, len(prompts), width + 1, H, generator=generator, dtype=torch.float64)).unbind()
    image = torch.tensor([[c == "i" for c in prompt.ljust(width, "i")] for prompt in prompts])
    features = Features(
        tokens=torch.zeros(len(prompts), width, dtype=torch.long),
        hidden=hidden[:, :width],
        embeds=embeds[:, :width],
        positions=torch.arange(width).expand(len(prompts), -1),
        image=image,  # padding claims to be a picture: it must not matter
        lengths=torch.tensor([len(prompt) for prompt in prompts]),
    )
    return features, embeds[:, 1:]


def cut(features: Features, size: int) -> Features:
    """The last sequence of a batch, without its padding."""
    given = {name: x for name, x in vars(features).items() if x is not None}
    return Features(**{name: x[-1:, :size] if x.ndim > 1 else x[-1:] for name, x in given.items()})


# --- the plain reference: Python lists, one row at a time


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def adaptor(state, picture):
    """Embeddings (L, H) of one picture -> (num_q, H), head by head."""
    q = state["imadpt.q"]
    keys, values = linear(state, "imadpt.k_proj", picture), linear(state, "imadpt.v_proj", picture)
    d, heads = q.shape[2], []
    for head in range(q.shape[1]):
        part = slice(head * d, (head + 1) * d)
        scores = q[:, head] @ keys[:, part].T / d**0.5
        heads.append(scores.softmax(-1) @ values[:, part])
    return torch.cat(heads, -1) @ state["imadpt.o_proj.weight"].T


def fuse(state, e, f, g):
    if "img_fc.weight" not in state:
        pass
    elif state["img_fc.weight"].shape[1] == 2 * H:
        f = linear(state, "img_fc", torch.cat([f, g]))
    else:
        f = f + linear(state, "img_fc", g)
    return linear(state, "fc", torch.cat([e, f]))


def layer_inputs(state, prompt, embeds, hidden):
    """What enters the layer for one prompt of n slots: rows [(position, vector, slot or None)], and the last g.

    embeds (n, H) of the token after each slot, hidden (n, H)
    """
    num_q = state["imadpt.q"].shape[0]
    visual = [i + 1 < len(prompt) and prompt[i + 1] == "i" for i in range(len(prompt))]
    rows, g, slot = [], torch.zeros(H, dtype=torch.float64), 0
    while slot < len(prompt):
        if not visual[slot]:
            rows.append((slot, fuse(state, embeds[slot], hidden[slot], g), slot))
            slot += 1
            continue
        end = slot
        while visual[end]:
            end += 1
        outputs = adaptor(state, embeds[slot:end])
        room = min(num_q - 1, end - slot)  # a picture of fewer rows keeps the last of its outputs
        compressed = outputs[: num_q - 1][num_q - 1 - room :]
        rows += [(end - room + j, compressed[j], None) for j in range(room)]
        g, slot = outputs[num_q - 1], end
    return rows, g


def norm(x, weight):
    return x / (x.pow(2).mean() + EPS).sqrt() * weight


def rotate(x, position):
    """RoPE on one head, pair by pair."""
    half, turned = len(x) // 2, x.clone()
    for i in range(half):
        angle = torch.tensor(position * THETA ** (-2 * i / len(x)), dtype=torch.float64)
        a, b = x[i], x[i + half]
        turned[i], turned[i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return turned


def layer(state, rows, heads=HEADS):
    """The decoder layer without input norm, row by row: rows [(position, vector)] -> (m, H)."""
    attn, mlp, d = "layers.0.self_attn", "layers.0.mlp", H // heads
    q, k, v = ([linear(state, f"{attn}.{name}_proj", x).view(heads, d) for _, x in rows] for name in "qkv")
    places, outputs = [position for position, _ in rows], []
    q, k = ([[rotate(x[h], p) for h in range(heads)] for x, p in zip(xs, places, strict=True)] for xs in (q, k))
    for row, (_, x) in enumerate(rows):
        mixed = []
        for head in range(heads):
            scores = torch.stack([q[row][head] @ k[past][head] / d**0.5 for past in range(row + 1)])
            mixed.append(sum(w * v[past][head] for past, w in enumerate(scores.softmax(0))))
        attended = x + linear(state, f"{attn}.o_proj", torch.cat(mixed))
        y = norm(attended, state["layers.0.post_attention_layernorm.weight"])
        gated = F.silu(linear(state, f"{mlp}.gate_proj", y)) * linear(state, f"{mlp}.up_proj", y)
        outputs.append(attended + linear(state, f"{mlp}.down_proj", gated))
    return torch.stack(outputs)


# --- the view and the way in


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_ragged_batch_equals_the_plain_reference(options):
    drafter = randomised(ViSpecDrafter(config(options=options, bias=True)).double())
    state, prompts = drafter.state_dict(), list(PROMPTS.values())
    features, embeds = features_of(prompts)
    rows = drafter.view(features, embeds)
    entered, outputs = drafter.enter(rows), drafter(rows)
    for number, prompt in enumerate(prompts):
        wanted, g = layer_inputs(state, prompt, embeds[number], features.hidden[number])
        count = len(wanted)
        assert rows.positions[number, :count].tolist() == [position for position, _, _ in wanted]
        assert rows.source[number, :count].tolist() == [-1 if slot is None else slot for _, _, slot in wanted]
        assert (rows.source[number, count:] == -1).all()
        torch.testing.assert_close(entered[number, :count], torch.stack([x for _, x, _ in wanted]))
        if rows.memory is not None:
            torch.testing.assert_close(rows.memory[number, count - 1], g)
        plain = layer(state, [(position, x) for position, x, _ in wanted])
        torch.testing.assert_close(outputs[number, :count], plain, atol=1e-5, rtol=1e-5)  # angles are float32


def test_generated_text_keeps_the_newest_pictures_vector():
    """In decoding there is no view: the session hands the vector back with every later row."""
    drafter = randomised(ViSpecDrafter(config()).double())
    state = drafter.state_dict()
    features, embeds = features_of([PROMPTS["several"]])
    rows = drafter.view(features, embeds)
    assert rows.positions[0, -1] == len(PROMPTS["several"]) - 1
    whole, _ = features_of([PROMPTS["several"] + "tt"], seed=1)
    later = type(rows)(whole.embeds[:, -2:], whole.hidden[:, -2:], rows.positions[:, -2:], memory=rows.memory[:, -2:])
    for row in range(2):
        wanted = fuse(state, later.embeds[0, row], later.hidden[0, row], rows.memory[0, -1])
        torch.testing.assert_close(drafter.enter(later)[0, row], wanted)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_sequence_alone_and_in_a_batch_are_the_same(prompt):
    drafter = randomised(ViSpecDrafter(config()).double())
    features, embeds = features_of([*PROMPTS.values(), prompt])
    alone = cut(features, len(prompt))
    one, many = drafter.view(alone, embeds[-1:, : len(prompt)]), drafter.view(features, embeds)
    count = one.positions.shape[1]
    assert one.source.shape == (1, count)
    torch.testing.assert_close(drafter(one)[0], drafter(many)[-1, :count])


def test_it_begins_as_the_plain_head():
    """`img_fc` starts as the identity on the feature, so a head trained on text goes on where it stood."""
    for options in ({}, {"fusion": "add"}, {"fusion": "none"}):
        drafter = ViSpecDrafter(config(options=options)).double()
        features, embeds = features_of(["tttt"])
        rows = drafter.view(features, embeds)
        plain = drafter.fc(torch.cat([embeds[:, :4], features.hidden], -1))
        torch.testing.assert_close(drafter.enter(rows), plain)


@pytest.mark.parametrize("fusion", ["concat", "add", "none"])
@pytest.mark.parametrize("prompts", [["tttt"], ["tiiitt", "tttt"]])
def test_every_weight_has_a_gradient(prompts, fusion):
    """Data parallelism waits for the gradient of each weight, also where a batch shows no picture."""
    drafter = ViSpecDrafter(config(options={"fusion": fusion})).double()
    drafter(drafter.view(*features_of(prompts))).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in drafter.parameters())


def test_the_names_are_the_published_ones():
    plain, biased = (set(ViSpecDrafter(config(bias=bias)).state_dict()) for bias in (False, True))
    assert (len(plain) + 1, len(biased) + 1) == (17, 22)  # with embed_tokens.weight, which is not ours to store
    assert {"imadpt.q", "imadpt.k_proj.weight", "imadpt.o_proj.weight", "img_fc.weight", "img_fc.bias"} < plain
    assert ViSpecDrafter(config()).state_dict()["imadpt.q"].shape == (2, HEADS, H // HEADS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queries": 2}, "queries"),
        ({"num_q": 0}, "num_q"),
        ({"num_q": "two"}, "num_q"),
        ({"adaptor_heads": -1}, "adaptor_heads"),
        ({"fusion": "gate"}, "fusion"),
    ],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        ViSpecDrafter(config(options=options))


# --- decoding


def test_the_picture_matters_to_the_draft_and_slots_do_not_mix():
    """Trees of a sequence are the same alone and beside others: the global vector belongs to its slot."""
    made, drafter = target("llava"), random_vispec("llava")
    prompts = [made.encode(tiny.conversation(images=n, seed=s)) for n, s in ((1, 0), (0, 1), (2, 2))]

    def grow(which: list[int]) -> list[list[int]]:
        session = drafter.session(made, slots=3, capacity=300)
        roots, teacher = [], made.session(slots=3, capacity=300)
        for number in which:
            logits, features = teacher.prefill(prompts[number])
            roots.append(logits[0, -1].argmax())
            session.begin(features, roots[-1][None])
        return session.draft(torch.stack(roots)).tokens.tolist()

    assert grow([0, 1, 2]) == [*grow([0]), *grow([1]), *grow([2])]
    assert Engine(made, drafter, slots=3, capacity=300).generate_all(prompts, Sampling(max_new_tokens=4))


# --- training


def test_two_stages_of_training(tmp_path):
    """The head on text, then everything on pictures, half of it on its own output; its draft is accepted afterwards."""
    talk, pictures = answered("llava", 3), speaker("llava")
    text = [Conversation(tuple(Message(m.role, m.content[-1:]) for m in row.messages)) for row in talk]
    drafter = {"input_norm": False, "tree": vars(TREE)}
    first = recipe(tmp_path / "first", steps=8, drafter={"method": "eaglevlm", **drafter})
    start = train(first, target=pictures, rows=text)
    second = recipe(
        tmp_path / "second",
        steps=40,
        drafter={"method": "vispec", "init_from": str(start), **drafter},
        objective={"smooth_l1": 0, "soft_ce": 0, "prob_l1": 10, "list_mle": 0.1},
        unroll={"steps": 2, "detach": False, "attention": "causal", "weights": [0.5, 0.5]},
        feature_noise=0.01,
    )
    made = load_drafter(train(second, target=pictures, rows=talk, val=talk))
    losses = [event["loss"] for event in events_of(tmp_path / "second", "step")]
    assert losses[-1] < 0.6 * losses[0]
    (figures,) = events_of(tmp_path / "second", "eval")
    assert figures["exact"] == 1
    assert figures["mean_acceptance_length"] > 1.5
    fresh = ViSpecDrafter(made.config).state_dict()
    assert not torch.equal(made.img_fc.weight, fresh["img_fc.weight"])
