"""SpecVLM against plain-tensor references of its formulas, and in use: compressed rows, gate, training, decoding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from oracle import Ask, assert_exact, prompt, target
from speculens.attention import causal_attention
from speculens.checkpoints import load_drafter, save_drafter
from speculens.drafters import DrafterConfig, SpecVLMDrafter
from speculens.drafters.compress import OPERATORS, CompressOptions, known_grid
from speculens.drafters.layer import biased_attention
from speculens.drafters.specvlm import find_runs
from speculens.engine import Engine
from speculens.errors import UserError
from speculens.features import Features
from speculens.sampling import Sampling
from speculens.show import drafter_lines, view_lines
from speculens.stats import Stats
from speculens.training import load_recipe, train
from speculens.training.config import Unroll, read_recipe
from speculens.training.unroll import unroll
from speculens.tree import TreeShape

ROOT = Path(__file__).parents[1]
H, HEADS, KV_HEADS, DIM = 12, 2, 1, 8
DOUBLE = torch.float64


def config(**options: Any):
    return DrafterConfig(
        speculator_type="specvlm",
        image_contract="compress",
        target_hidden_size=H,
        target_vocab_size=20,
        target_family="none",
        intermediate_size=16,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        options=options,
    )


def made(seed: int = 0, **options: Any) -> SpecVLMDrafter:
    """Random weights, so that the gate has opinions."""
    drafter = SpecVLMDrafter(config(**options)).to(DOUBLE).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in drafter.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator, dtype=DOUBLE) * 0.5)
    return drafter


def features(*marks: str, seed: int = 0) -> tuple[Features, Tensor]:
    """Sequences written as marks: `i` an image row, `t` text, `a` an answer being learnt; padded on the right.

    Padding holds NaN in what a view must not read, and image marks that mean nothing.
    """
    width = max(map(len, marks)) + 2
    generator = torch.Generator().manual_seed(seed)
    hidden, embeds = torch.randn(2, len(marks), width, H, generator=generator, dtype=DOUBLE)
    image = torch.tensor([[mark == "i" for mark in line.ljust(width, "i")] for line in marks])
    answer = torch.tensor([[mark == "a" for mark in line.ljust(width, "a")] for line in marks])
    lengths = torch.tensor([len(line) for line in marks])
    positions = torch.arange(width).expand(len(marks), -1)
    known = Features(torch.zeros_like(positions), hidden, embeds, positions, image, lengths, answer)
    return known, torch.cat([embeds[:, 1:], torch.randn(len(marks), 1, H, generator=generator, dtype=DOUBLE)], 1)


def runs_of(line: str) -> list[tuple[int, int]]:
    """Slots [start, stop) whose next token is an image row, by walking along."""
    found, start = [], None
    for slot in range(len(line)):
        visual = line[slot + 1 : slot + 2] == "i"
        if visual and start is None:
            start = slot
        if not visual and start is not None:
            found.append((start, slot))
            start = None
    return found


# --- a plain reference: one row at a time, one operator at a time


def subset(rows: int, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + rows)
    return sorted(torch.randperm(rows, generator=generator)[:count].tolist())


def pooled(rows: int, ratio: float, *, grid: bool) -> list[list[int]]:
    """Members of each group, by the definition of each cell's group."""
    side = math.isqrt(rows)
    groups: dict[tuple[int, ...], list[int]] = {}
    if grid and side * side == rows:
        few = max(1, round(side / math.sqrt(ratio)))
        for cell in range(rows):
            groups.setdefault((cell // side * few // side, cell % side * few // side), []).append(cell)
    else:
        for cell in range(rows):
            groups.setdefault((cell * math.ceil(rows / ratio) // rows,), []).append(cell)
    return [groups[key] for key in sorted(groups)]


def reference(name: str, drafter: SpecVLMDrafter, e: Tensor, f: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """Rows (embedding, feature, last) that an operator makes of one run, e and f (m, H)."""
    options, rows = drafter.options, len(e)
    weights = dict(drafter.operators[name].named_parameters())
    if name == "none":
        return []
    if name == "prune":
        count = math.ceil(rows / options.ratio("prune"))
        kept = subset(rows, count, options.seed)
        if options.keep == "norm":
            kept = sorted(sorted(range(rows), key=lambda i: -float(f[i].norm()))[:count])
        return [(e[i], f[i], i) for i in kept]
    if name == "pool":
        groups = pooled(rows, options.ratio("pool"), grid=options.mode != "weighted")
        return [(sum(e[i] for i in g) / len(g), sum(f[i] for i in g) / len(g), g[-1]) for g in groups]
    if name == "conv":
        stride, out = int(options.ratio("conv")), []
        for start in range(0, rows, stride):
            members = [min(start + s, rows - 1) for s in range(stride)]
            w = weights["weight"]
            w = torch.stack([torch.diag(w[:, s]) for s in range(stride)], -1) if options.depthwise else w
            out.append((*(sum(w[:, :, s] @ x[i] for s, i in enumerate(members)) for x in (e, f)), members[-1]))
        return out
    key, value, out = (weights[f"{part}_proj.weight"] for part in "kvo")
    width = key.shape[0] // HEADS
    made_of = []
    for number in range(min(options.queries, rows)):
        mixed: tuple[list, list] = ([], [])
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([weights["query"][head, number] @ (key @ row)[part] for row in e]) / width**0.5
            share = scores.exp() / scores.exp().sum()
            for stream, x in zip(mixed, (e, f), strict=True):
                stream.append(sum(a * (value @ row)[part] for a, row in zip(share, x, strict=True)))
        made_of.append((out @ torch.cat(mixed[0]), out @ torch.cat(mixed[1]), rows - 1))
    return made_of


def gate(drafter: SpecVLMDrafter, mean: Tensor) -> Tensor:
    first, _, second = drafter.gate
    inner = first.weight @ mean + first.bias
    return second.weight @ (inner * torch.sigmoid(inner)) + second.bias


def question(line: str, stop: int, most: int) -> list[int]:
    """Rows between the last picture and the first answer behind the run that ends before row `stop` + 1."""
    end = next((i for i in range(stop + 1, len(line)) if line[i] == "a"), len(line))
    asked = max(i for i in range(end) if line[i] == "i") + 1
    return list(range(max(asked, end - most), end)) or [end - 1]


def reference_rows(drafter: SpecVLMDrafter, known: Features, next_embeds: Tensor, number: int, line: str):
    """All rows of one sequence: (embedding, feature, position, source), and the chosen operators."""
    e, f = next_embeds[number], known.hidden[number]
    rows, chosen, reached = [], [], 0
    options = drafter.options
    for start, stop in runs_of(line):
        rows += [(e[i], f[i], i, i) for i in range(reached, start)]
        e_run, f_run = e[start:stop], f[start:stop]
        asked = question(line, stop, options.question_tokens)
        z = gate(drafter, sum(f[i] for i in asked) / len(asked)) if drafter.gate else torch.zeros(1)
        parts = {name: reference(name, drafter, e_run, f_run) for name in options.used}
        if options.mode == "select":
            chosen.append(options.used[int(z.argmax())])
            few = parts[chosen[-1]]
        elif options.mode == "concat":
            few = [row for name in options.used for row in parts[name]][: stop - start]
        else:
            share = z.exp() / z.exp().sum()
            few = [
                (*(sum(w * row[s] for w, row in zip(share, rows_, strict=True)) for s in (0, 1)), rows_[-1][2])
                for rows_ in zip(*parts.values(), strict=True)
            ]
        rows += [(a, b, start + last, -1) for a, b, last in few]
        reached = stop
    return [*rows, *((e[i], f[i], i, i) for i in range(reached, len(line)))], chosen


def reference_layer(drafter: SpecVLMDrafter, rows, weights: Tensor | None = None) -> Tensor:
    """The EAGLE-2 head over one sequence's rows; `weights` (m,) of rows as keys -> (m, H)."""
    layer, eps = drafter.layers[0], drafter.config.rms_norm_eps
    x = torch.stack([drafter.fc.weight @ torch.cat([e, f]) + drafter.fc.bias for e, f, *_ in rows])
    count = torch.ones(len(rows), dtype=DOUBLE) if weights is None else weights

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def turned(x: Tensor, position: int) -> Tensor:
        half = DIM // 2
        angle = position * 10000.0 ** (-torch.arange(half, dtype=DOUBLE) / half)
        a, b = x[:half], x[half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    normed, attention = norm(x, layer.input_layernorm.weight), layer.self_attn
    q, k, v = (normed @ project.weight.T for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = []
    for i, row in enumerate(rows):
        heads = []
        for head in range(HEADS):
            query = turned(q[i, head * DIM : (head + 1) * DIM], row[2])
            mass = torch.stack([(query @ turned(k[j], rows[j][2]) / DIM**0.5).exp() for j in range(i + 1)])
            mass = mass * count[: i + 1]
            heads.append((mass @ v[: i + 1]) / mass.sum())
        mixed.append(attention.o_proj.weight @ torch.cat(heads))
    x = x + torch.stack(mixed)
    inner = norm(x, layer.post_attention_layernorm.weight)
    up, open_ = inner @ layer.mlp.up_proj.weight.T, inner @ layer.mlp.gate_proj.weight.T
    return x + (open_ * torch.sigmoid(open_) * up) @ layer.mlp.down_proj.weight.T


# --- operators


@pytest.mark.parametrize("rows", [1, 2, 7, 9, 12, 36])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prune", {"ratios": {"prune": 5}, "seed": 3}),
        ("prune", {"ratios": {"prune": 2.5}, "keep": "norm"}),
        ("pool", {"ratios": {"pool": 5}}),
        ("conv", {}),
        ("conv", {"ratios": {"conv": 5}, "depthwise": True}),
        ("resample", {"queries": 3, "resample_width": 4}),
        ("none", {}),
    ],
)
def test_operators_equal_their_definitions(rows, name, options):
    drafter = made(operators=[name], **options)
    e, f = torch.randn(2, 3, rows, H, generator=torch.Generator().manual_seed(rows), dtype=DOUBLE)
    embeds, hidden, last = drafter.operators[name](e, f)
    for run in range(3):
        wanted = reference(name, drafter, e[run], f[run])
        assert last[run].tolist() == [row[2] for row in wanted]
        for got, stream in ((embeds, 0), (hidden, 1)):
            expected = torch.stack([row[stream] for row in wanted]) if wanted else e.new_zeros(0, H)
            torch.testing.assert_close(got[run], expected)
    assert last.shape[1] <= rows


def test_a_grid_is_a_square_or_given():
    assert known_grid(36, None) == (6, 6)
    assert known_grid(36, (4, 9)) == (4, 9)
    assert known_grid(12, None) is None
    assert known_grid(12, (4, 9)) is None
    pool = OPERATORS["pool"](config(), CompressOptions(ratios={"pool": 4}, grid=(2, 6)))
    x = torch.arange(12.0).view(1, 12, 1)
    embeds, _, last = pool(x, x)
    assert embeds.flatten().tolist() == [3.5, 5.5, 7.5]  # tiles of 2 x 2: the mean of 0, 1, 6, 7 is 3.5
    assert last.tolist() == [[7, 9, 11]]


def test_defaults_keep_the_papers_share_of_576_rows():
    e = torch.randn(1, 576, H)
    sizes = {name: op(e, e).last.shape[1] for name, op in SpecVLMDrafter(config()).operators.items()}
    assert sizes == {"prune": 29, "pool": 25, "conv": 192, "resample": 2, "none": 0}


def test_conv_begins_as_the_mean():
    e = torch.randn(2, 9, H)
    for depthwise in (False, True):
        conv = OPERATORS["conv"](config(), CompressOptions(depthwise=depthwise))
        torch.testing.assert_close(conv(e, e).hidden, e.unflatten(1, (3, 3)).mean(2))


# --- the view and the head

LINES = {
    "one": ["tt" + "i" * 9 + "ttt"],
    "several": ["t" + "i" * 9 + "tt" + "i" * 7 + "ttt", "ttt" + "i" * 7 + "t"],
    "none": ["tttttt", "t"],
    "ragged": ["t" + "i" * 7 + "tt", "tttttt", "tt" + "i" * 9 + "t" + "i" * 7 + "tttaaa"],
    "at the edges": ["i" * 8 + "t", "t" + "i" * 8],
    "turns": ["t" + "i" * 4 + "tttaat" + "i" * 4 + "ttaaa", "t" + "i" * 4 + "t"],
}
OPTIONS = {
    "select": {"ratios": {"prune": 4, "pool": 4}, "question_tokens": 2},
    "pool alone": {"operators": ["pool"], "ratios": {"pool": 3}},
    "norms": {"operators": ["prune", "none"], "keep": "norm", "ratios": {"prune": 2}},
    "weighted": {"mode": "weighted"},
    "concat": {"mode": "concat", "ratios": {"prune": 4, "pool": 4}},
}


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_view_and_forward_equal_the_plain_reference(lines, options):
    known, next_embeds = features(*lines)
    drafter = made(**options)
    rows = drafter.view(known, next_embeds)
    output = drafter(rows)
    widths = []
    for number, line in enumerate(lines):
        wanted, chosen = reference_rows(drafter, known, next_embeds, number, line)
        widths.append(len(wanted))
        part = (number, slice(len(wanted)))
        torch.testing.assert_close(rows.embeds[part], torch.stack([row[0] for row in wanted]))
        torch.testing.assert_close(rows.hidden[part], torch.stack([row[1] for row in wanted]))
        assert rows.positions[part].tolist() == [row[2] for row in wanted]
        assert rows.source[part].tolist() == [row[3] for row in wanted]
        assert (rows.source[number, len(wanted) :] == -1).all()
        torch.testing.assert_close(output[part], reference_layer(drafter, wanted))
        assert drafter.choices(known)[number] == chosen
        assert rows.notes[number].get("operator", []) == chosen
    assert rows.embeds.shape[1] == max(widths)


def test_the_gate_listens_to_the_question():
    """Same picture, another question: another operator for some; the answer itself is never heard."""
    drafter, line = made(), "t" + "i" * 9 + "ttttaaa"
    heard = set()
    for seed in range(20):
        known, _ = features(line, seed=seed)
        known.hidden[:, :10] = 1.0
        (chosen,) = drafter.choices(known)
        known.hidden[:, 14:] = torch.randn_like(known.hidden[:, 14:])
        assert drafter.choices(known) == [chosen]
        heard.update(chosen)
    assert len(heard) > 2


def test_training_and_decoding_ask_the_same_question():
    """Training sees the whole conversation with its answer marked, decoding the prompt alone."""
    known, _ = features("tt" + "i" * 9 + "ttttaaa", "tt" + "i" * 9 + "tttt")
    cut = Features(*(getattr(known, name)[:1, :15] for name in ("tokens", "hidden", "embeds", "positions", "image")),
                   lengths=torch.tensor([15]))  # fmt: skip
    assert [run.question for run in find_runs(cut, 64)] == [run.question for run in find_runs(known, 64)][:1]
    assert find_runs(known, 64)[0].question == range(11, 15)
    assert find_runs(known, 3)[0].question == range(12, 15)


# --- learning to choose


def test_biased_attention_is_attention_with_weighted_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=generator, dtype=DOUBLE) for heads in (4, 2, 2))
    weights = torch.rand(2, 6, generator=generator, dtype=DOUBLE).requires_grad_()
    got = biased_attention(causal_attention, weights.log())(q, k, v)
    scores = (
        (q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5).exp()
        * weights[:, None, None]
        * torch.ones(6, 6).tril()
    )
    wanted = (scores / scores.sum(-1, keepdim=True)) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(x.square().sum(), weights, retain_graph=True)[0] for x in (got, wanted)]
    torch.testing.assert_close(*grads)
    plain = biased_attention(causal_attention, torch.zeros(2, 6))(q, k, v)
    torch.testing.assert_close(plain, causal_attention(q, k, v))


def drawn(drafter: SpecVLMDrafter, known: Features, seed: int) -> tuple[list[str], Tensor]:
    """The operators that training would draw with this seed, and the soft choice, by the formula."""
    runs = find_runs(known, drafter.options.question_tokens)
    z = torch.stack([gate(drafter, known.hidden[run.sequence, list(run.question)].mean(0)) for run in runs])
    torch.manual_seed(seed)
    soft = ((z - torch.empty_like(z).exponential_().log()) / drafter.temperature).softmax(-1)
    return [drafter.options.used[i] for i in soft.argmax(-1)], soft


@pytest.mark.parametrize("seed", range(6))
def test_learning_selects_as_decoding_would_and_gives_the_gate_its_straight_through_gradient(seed):
    """Forward: the drawn operator alone. Backward: each operator's weight as a key, times the soft choice's slope."""
    line = "tt" + "i" * 9 + "tttt"
    known, next_embeds = features(line)
    drafter = made(ratios={"prune": 4, "pool": 4}).train()
    drafter.anneal(0.5)
    (name,), soft = drawn(drafter, known, seed)
    torch.manual_seed(seed)
    rows = drafter.view(known, next_embeds)
    output = drafter(rows)
    assert rows.bias is not None
    text = rows.source[0] >= 0
    assert rows.source[0, text].tolist() == [0, *range(10, 15)]

    alone = made(ratios={"prune": 4, "pool": 4}, operators=[name])
    alone.load_state_dict(drafter.state_dict(), strict=False)
    chosen = alone.view(known, next_embeds)
    torch.testing.assert_close(output[0, text], alone(chosen)[0, chosen.source[0] >= 0], rtol=1e-5, atol=1e-5)

    # The same by the plain reference, with weights of keys that are 0 or 1 and have the soft choice's gradient.
    used = drafter.options.used
    hard = torch.tensor([float(one == name) for one in used], dtype=DOUBLE)
    st = hard + soft[0] - soft[0].detach()
    parts = [reference(one, drafter, next_embeds[0, 1:10], known.hidden[0, 1:10]) for one in used]
    plain = [(next_embeds[0, 0], known.hidden[0, 0], 0, 0)]
    plain += [(e, f, 1 + last, -1) for part in parts for e, f, last in part]
    plain += [(next_embeds[0, i], known.hidden[0, i], i, i) for i in range(10, 15)]
    weights = [torch.ones(1, dtype=DOUBLE), *(w.expand(len(part)) for w, part in zip(st, parts, strict=True))]
    wanted = reference_layer(drafter, plain, torch.cat([*weights, torch.ones(5, dtype=DOUBLE)]))
    rows_of_text = [i for i, row in enumerate(plain) if row[3] >= 0]
    torch.testing.assert_close(output[0, text], wanted[rows_of_text], rtol=1e-5, atol=1e-5)
    gates = list(drafter.gate.parameters())
    got, expected = (torch.autograd.grad(x.square().sum(), gates) for x in (output[0, text], wanted[rows_of_text]))
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_self_fed_steps_see_the_drawn_operator_alone():
    """The bias goes through the trainer's own attention of several steps. Chains here begin behind the picture."""
    known, next_embeds = features("tt" + "i" * 9 + "tttttt")
    drafter = made(ratios={"prune": 4, "pool": 4}).train()
    (name,), _ = drawn(drafter, known, 3)
    alone = made(ratios={"prune": 4, "pool": 4}, operators=[name])
    alone.load_state_dict(drafter.state_dict(), strict=False)
    torch.manual_seed(3)
    all_rows, few = drafter.view(known, next_embeds), alone.view(known, next_embeds)
    assert all_rows.positions.shape[1] > few.positions.shape[1]
    plan = Unroll(steps=3, detach=False)
    for got, wanted in zip(unroll(drafter, all_rows, plan), unroll(alone, few, plan), strict=True):
        torch.testing.assert_close(got[0, all_rows.source[0] > 11], wanted[0, few.source[0] > 11], rtol=1e-5, atol=1e-5)


def test_operators_that_were_not_drawn_do_not_learn():
    known, next_embeds = features("tt" + "i" * 9 + "tttt")
    drafter = made().train()
    for seed in range(8):
        (name,), _ = drawn(drafter, known, seed)
        torch.manual_seed(seed)
        rows = drafter.view(known, next_embeds)
        drafter.zero_grad()
        drafter(rows)[rows.source >= 0].square().sum().backward()
        for other in ("conv", "resample"):
            largest = max(float(weight.grad.abs().max()) for weight in drafter.operators[other].parameters())
            assert (largest > 1e-3) == (other == name)


def test_draws_follow_the_gate_and_cool_down():
    drafter = made().train()
    z = torch.randn(5, dtype=DOUBLE).expand(20000, -1)
    torch.manual_seed(0)
    share = drafter._draw(z).mean(0)
    torch.testing.assert_close(share, z[0].softmax(-1), atol=0.02, rtol=0)
    assert drafter.temperature == 1.0
    drafter.anneal(0.5)
    assert drafter.temperature == 0.75
    drafter.anneal(1.0)
    assert drafter.temperature == 0.5


def test_a_drafter_that_nobody_told_to_evaluate_decodes_all_the_same():
    known, next_embeds = features(*LINES["several"])
    with torch.no_grad():
        one, other = made().train().view(known, next_embeds), made().view(known, next_embeds)
    assert one.bias is None
    assert torch.equal(one.embeds, other.embeds)


# --- the options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mod": "select"}, "unknown key mod; did you mean mode"),
        ({"mode": "all"}, "mode 'all' is none of select, weighted, concat"),
        ({"mode": "weighted", "operators": ["none"]}, "operators of mode weighted are distinct ones of prune, pool"),
        ({"operators": []}, "operators of mode select"),
        ({"operators": ["pool", "pool"]}, "distinct"),
        ({"ratios": {"prune": 0.5}}, "ratios are at least 1"),
        ({"ratios": {"none": 2}}, "ratios are at least 1 and belong to prune, pool, conv"),
        ({"ratios": {"conv": 2.5}}, "stride, is a whole number"),
        ({"ratios": {"conv": "x"}}, "ratios.conv must be a number"),
        ({"keep": "best"}, "keep is random or norm"),
        ({"grid": [3]}, "grid must be 2 values"),
        ({"grid": [3, 0]}, "grid is rows and columns"),
        ({"queries": 0}, "are above 0"),
        ({"queries": 1.5}, "queries must be a whole number"),
        ({"temperature": [1.0, 0.0]}, "two positive numbers"),
        ({"resample_width": 3}, "resample_width 3 is no multiple of the drafter's 2 attention heads"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        SpecVLMDrafter(config(**options))


# --- in use


def drafter_for(family: str, **options: Any) -> SpecVLMDrafter:
    lender = target(family)
    values = config(**options).to_dict() | {
        "target_hidden_size": lender.hidden_size,
        "target_vocab_size": lender.vocab_size,
        "target_family": lender.family,
        "tree": {"num_steps": 2, "topk": 3, "num_draft_tokens": 9},
    }
    torch.manual_seed(0)
    return SpecVLMDrafter(DrafterConfig.from_dict(values)).to(lender.dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm", "gemma3", "paligemma"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decoding_is_exact_in_ragged_batches(family, options):
    asks = [Ask(), Ask(images=2, seed=1), Ask(images=0, seed=3), Ask(images=3, turns=3, seed=2)]
    asks[2] = Ask(seed=3) if family == "paligemma" else asks[2]
    samplings = [Sampling(max_new_tokens=length) for length in (9, 12, 7, 10)]
    assert_exact(family, drafter_for(family, **options), asks, samplings, slots=3)


def test_the_choice_is_told_with_the_statistics():
    drafter = drafter_for("qwen2_5_vl", operators=["prune", "pool", "none"])
    engine = Engine(target("qwen2_5_vl"), drafter, capacity=512)
    two, none = (
        engine.generate(prompt("qwen2_5_vl", ask), Sampling(max_new_tokens=4)).stats
        for ask in (Ask(images=2), Ask(images=0))
    )
    assert len(two.drafter_notes["operator"]) == 2
    assert set(two.drafter_notes["operator"]) <= {"prune", "pool", "none"}
    assert view_lines(two.to_dict())["operator"] == ", ".join(two.drafter_notes["operator"])
    assert none.to_dict()["drafter_notes"].get("operator", []) == []
    assert Stats.total([two, none, two]).drafter_notes["operator"] == two.drafter_notes["operator"] * 2
    assert drafter_lines({**drafter.describe(), "bytes": 0})["view"] == "one of prune 20x, pool 20x, none"


def test_saved_and_loaded_it_is_the_same(tmp_path):
    drafter = drafter_for("llava", ratios={"prune": 2}, grid=[2, 2], temperature=[2.0, 1.0])
    loaded = load_drafter(save_drafter(drafter, tmp_path))
    assert loaded.options == drafter.options
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in drafter.state_dict().items())


@pytest.mark.parametrize("mode", ["select", "weighted", "concat"])
def test_every_mode_trains_and_stays_exact(mode, tmp_path):
    rows = [tiny.conversation("qwen2_5_vl", images=i, seed=i).then("assistant", "Two bars. " * 3) for i in range(3)]
    method = {
        "method": "specvlm",
        "tree": {"num_steps": 2, "topk": 3, "num_draft_tokens": 8},
        "options": {"mode": mode},
    }
    recipe = read_recipe(
        {
            "target": "tiny",
            "drafter": method,
            "output": str(tmp_path / "run"),
            "optimiser": {"lr": 5e-3},
            "batch_size": 3,
            "steps": 20,
            "dtype": "float32",
            "workers": 0,
            "log_every": 1,
            "eval_tokens": 8,
        }
    )
    folder = train(recipe, target=target("qwen2_5_vl"), rows=rows, val=rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses[-1] < 0.9 * losses[0]
    (measured,) = [line for line in lines if line["event"] == "eval"]
    assert measured["exact"] == 1
    assert ("drafter_notes" in measured) == (mode == "select")
    assert load_drafter(folder).options.mode == mode


def test_the_trainer_cools_the_gate(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(SpecVLMDrafter, "anneal", lambda _, progress: seen.append(progress))
    rows = [tiny.conversation("llava").then("assistant", "Two bars.")]
    values = {"target": "tiny", "drafter": {"method": "specvlm"}, "output": str(tmp_path / "run"), "steps": 4}
    train(read_recipe(values | {"batch_size": 1, "workers": 0, "dtype": "float32"}), target=target("llava"), rows=rows)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_the_testbeds_drafter_is_small():
    """At most 1.2 MB in bfloat16, for a target of hidden size 256 with two heads of 128 and one KV head."""
    recipe = load_recipe(ROOT / "recipes/testbed/specvlm.yaml")
    geometry = dict(target_hidden_size=256, intermediate_size=272, head_dim=128, tree=TreeShape())
    values = config(**recipe.drafter.options).to_dict() | geometry
    drafter = SpecVLMDrafter(DrafterConfig(**values))
    assert sum(weight.numel() for weight in drafter.parameters()) * 2 < 1.2e6
