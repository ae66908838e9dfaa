"""K steps over whole sequences are K steps of drafting, one chain after another: outputs, gradients, what trains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tiny
from speculens.checkpoints import load_drafter
from speculens.drafters import METHODS, TrainedDrafter
from speculens.drafters.rows import Rows
from speculens.drafters.session import HeadSession
from speculens.errors import UserError
from speculens.features import Features
from speculens.targets import Target
from speculens.training import train
from speculens.training.batches import Encoder, collate
from speculens.training.config import DrafterRecipe, Objective, Unroll, read_recipe
from speculens.training.losses import objective
from speculens.training.student import Student, distil, make_drafter
from speculens.training.unroll import Lesson, Selection, chain_mask, lesson_losses, unroll
from speculens.tree import TreeShape
from test_training import answered, events_of, recipe, speaker

STEPS = 3


def target(family: str) -> Target:
    return Target(tiny.model(family), tiny.processor(family))


def made(method: str, family: str, seed: int = 0, **options: object) -> TrainedDrafter:
    """A drafter of random weights in float64; none of them is zero or one."""
    torch.manual_seed(seed)
    drafter = make_drafter(DrafterRecipe(method, options=options), target(family)).to(torch.float64)
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return drafter


def taught(family: str, images: tuple[int, ...] = (1, 2, 0)) -> Features:
    """A ragged batch with these numbers of pictures."""
    encoder = Encoder(target(family), 4096)
    rows = [
        encoder.row(tiny.conversation(family, images=count, seed=seed).then("assistant", "Two circles. " * (seed + 1)))
        for seed, count in enumerate(images)
    ]
    batch = collate(rows, 0, torch.float64)
    return target(family).teach(batch.inputs, batch.image)


def viewed(drafter: TrainedDrafter, features: Features) -> Rows:
    nothing = torch.zeros_like(features.embeds[:, :1])
    return drafter.view(features, torch.cat([features.embeds[:, 1:], nothing], 1))


def row_of(rows: Rows, sequence: int, start: int, stop: int) -> Rows:
    part = (slice(sequence, sequence + 1), slice(start, stop))
    return Rows(**{name: x[part] if isinstance(x, Tensor) else x for name, x in vars(rows).items()})


def lengths_of(rows: Rows) -> list[int]:
    """Rows of each sequence without its padding; a row that stands for no slot may stand among others."""
    return [int((source >= 0).nonzero().max()) + 1 for source in rows.source]


def naive(drafter: TrainedDrafter, rows: Rows, sequence: int, length: int, detach: bool) -> list[dict[int, Tensor]]:
    """Drafting as it happens, one chain at a time: prefill, then each token on the output before it. By step and row.

    Nothing is masked: a step's keys are those that exist by then.
    """
    past: list[tuple[Tensor, Tensor]] = []

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        past.append((keys, values))
        keys, values = (torch.cat([pair[i] for pair in past], 2).repeat_interleave(2, 1) for i in (0, 1))
        weights = (queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])).softmax(-1)
        return weights @ values

    outputs: list[dict[int, Tensor]] = [{} for _ in range(STEPS)]
    prefix: list[tuple[Tensor, Tensor]] = []
    for start in range(length):
        past[:] = prefix
        fed = drafter(row_of(rows, sequence, start, start + 1), attend)
        outputs[0][start], prefix = fed[0, 0], list(past)
        for step in range(1, min(STEPS, length - start)):
            row = row_of(rows, sequence, start + step, start + step + 1)
            fed = drafter(replace(row, hidden=fed.detach() if detach else fed), attend, step)
            outputs[step][start + step] = fed[0, 0]
    return outputs


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    ("method", "family", "options"),
    [
        ("eaglevlm", "llava", {}),
        ("eaglevlm", "qwen2_5_vl", {}),
        ("hivis", "llava", {}),
        ("hivis", "qwen2_5_vl", {}),
        ("hivis", "qwen2_5_vl", {"border": "vllm", "positions": "contiguous"}),
        ("hivis", "qwen2_5_vl", {"steps": 2, "border": "after"}),
        ("vispec", "llava", {}),
        ("specvlm", "llava", {}),
    ],
)
def test_the_unroll_is_drafting_step_by_step(method, family, options, detach):
    """Ragged batch, pictures and none, float64: same outputs and same gradients of every weight and of the features."""
    drafter, features = made(method, family, **options), taught(family)
    rows = viewed(drafter, features)
    rows = replace(rows, hidden=rows.hidden.detach().requires_grad_())
    lengths = lengths_of(rows)
    assert len(set(lengths)) > 1
    outputs = unroll(drafter, rows, Unroll(steps=STEPS, detach=detach))
    probes = [torch.randn_like(output) for output in outputs]

    loss = naive_loss = 0.0
    for sequence, length in enumerate(lengths):
        for step, slow in enumerate(naive(drafter, rows, sequence, length, detach)):
            assert list(slow) == list(range(step, length))
            for row, output in slow.items():
                torch.testing.assert_close(outputs[step][sequence, row], output, rtol=1e-9, atol=1e-10)
                loss = loss + (outputs[step][sequence, row] * probes[step][sequence, row]).sum()
                naive_loss = naive_loss + (output * probes[step][sequence, row]).sum()
    weights = [rows.hidden, *drafter.parameters()]
    # Both share the view's own graph; a view may leave a weight of its own unused.
    one, other = (
        torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (loss, naive_loss)
    )
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    if method in ("eaglevlm", "hivis"):
        assert all(gradient.abs().max() > 0 for gradient in other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_unroll_is_what_a_session_drafts(method, family):
    """A real session over the prompt alone, fed the text's own tokens: cache, positions and steps are training's."""
    # Answers are not marked here, so that a gate would read a longer question in the whole text than in the prompt.
    options = {"operators": ["pool"]} if method == "specvlm" else {}
    lender, drafter = target(family), made(method, family, **options)
    features = taught(family, (2,))
    with torch.no_grad():
        rows = viewed(drafter, features)
        outputs = unroll(drafter, rows, Unroll(steps=STEPS))
        n = int(features.lengths)
        for prompt in (n - 6, n - 5, n - 4):
            cut = Features(*(getattr(features, name)[:, :prompt] for name in ("tokens", "hidden", "embeds",
                             "positions", "image")), torch.tensor([prompt]))  # fmt: skip
            session = HeadSession(drafter, lender, 1, 128, TreeShape(num_steps=STEPS, topk=1, num_draft_tokens=STEPS))
            session.begin(cut, features.tokens[:, prompt])
            row = int((rows.source[0] == prompt - 1).nonzero())
            torch.testing.assert_close(session._hidden[0], outputs[0][0, row])
            fed = session._hidden[:, None]
            for level in range(STEPS - 1):
                drafted = features.tokens[:, prompt + 1 + level][:, None]
                positions = (session._position[:1, None] + level).expand_as(drafted)
                entered, above = session._rows(drafted, fed, positions), torch.ones(1, 1, level + 1, dtype=torch.bool)
                fed = session._extend(entered, session._turns[:, positions], above, start=level, step=level + 1)
                torch.testing.assert_close(fed[0, 0], outputs[level + 1][0, row + 1 + level])


def test_the_mask_is_the_drawn_one():
    mask = chain_mask(5, 2)
    assert mask.shape == (5, 15)
    assert mask[3].nonzero().flatten().tolist() == [0, 1, 5 + 2, 10 + 3]
    assert mask.sum(1).tolist() == [1, 2, 3, 4, 5]  # a query at row t sees t + 1 keys, at every step


def test_causal_attention_is_a_plain_pass_over_the_shifted_outputs():
    """ViSpec's second pass; the gradient reaches the first through what it is fed."""
    drafter = made("eaglevlm", "llava")
    rows = viewed(drafter, taught("llava"))
    first, second = unroll(drafter, rows, Unroll(steps=2, attention="causal", detach=False))
    torch.testing.assert_close(first, drafter(rows))
    own = torch.cat([rows.hidden[:, :1], first[:, :-1]], 1)
    torch.testing.assert_close(second, drafter(replace(rows, hidden=own), step=1))
    assert torch.autograd.grad(second.sum(), first)[0].abs().max() > 0
    detached = unroll(drafter, rows, Unroll(steps=2, attention="causal"))
    assert torch.autograd.grad(detached[1].sum(), detached[0], allow_unused=True) == (None,)


# --- which positions train


def lesson_of(hits_at: list[int], rows: int = 8, steps: int = 3) -> tuple[Lesson, Tensor]:
    """One sequence whose rows 1 .. rows - 1 train, and which of them are hits."""
    place = torch.stack([torch.zeros(rows - 1, dtype=torch.long), torch.arange(1, rows)])
    nothing = torch.zeros(rows - 1, 4)
    hits = torch.isin(place[1], torch.tensor(hits_at))
    return Lesson((nothing,) * steps, nothing, place, (1, rows)), hits


@pytest.mark.parametrize(
    ("select", "second", "third"),
    [
        ("none", [1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]),  # a chain of k tokens needs k rows before it
        ("chain", [2, 3, 6, 7], [4, 7]),  # hit_0[t - 1]; hit_1[t - 1] and hit_0[t - 2]
        ("public", [1, 2, 5, 6], [3, 6]),  # hit_0[t]; hit_1[t] and hit_0[t - 1]
    ],
)
def test_who_survives_by_either_rule(select, second, third):
    lesson, first_hits = lesson_of([1, 2, 5, 6])
    selection = Selection(lesson, Unroll(steps=3, select=select))
    assert selection.kept(0) is None
    if select != "none":
        selection.observe(first_hits)
    assert lesson.place[1][selection.kept(1)].tolist() == second
    if select != "none":
        selection.observe(torch.isin(lesson.place[1], torch.tensor([3, 6])))
    assert lesson.place[1][selection.kept(2)].tolist() == third


@pytest.mark.parametrize("select", ["none", "chain", "public"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_each_step_is_a_mean_over_its_own_positions(select, chunk):
    """Against plain loops over positions and steps; two sequences, gaps in what trains."""
    torch.manual_seed(0)
    head, shape = torch.randn(30, 4, dtype=torch.float64), (2, 9)
    trains = torch.rand(shape) < 0.8
    place = trains.nonzero().T
    steps = tuple(torch.randn(place.shape[1], 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    teacher = torch.randn(place.shape[1], 4, dtype=torch.float64)
    plan = Unroll(steps=3, select=select, hit=12, weights=(1.0, 0.5, 0.25))
    terms = Objective(smooth_l1=1.0, soft_ce=0.1, topk_ce=1.0, top=5)
    got = lesson_losses(Lesson(steps, teacher, place, shape), lambda x: x @ head.T, terms, plan, chunk)

    where = {tuple(at): i for i, at in enumerate(place.T.tolist())}

    def hit(step: int, sequence: int, row: int) -> bool:
        if (sequence, row) not in where:
            return False
        i = where[sequence, row]
        return int((teacher[i] @ head.T).argmax()) in (steps[step][i] @ head.T).topk(12).indices.tolist()

    total, kept_of = 0.0, []
    for step in range(3):
        kept = []
        for (sequence, row), i in where.items():
            offset = {"none": None, "chain": step, "public": step - 1}[select]
            chain = [] if offset is None else [hit(j, sequence, row - offset + j) for j in range(step)]
            if row >= step and all(chain):
                kept.append(i)
        kept_of.append(kept)
        part = objective(steps[step][kept], teacher[kept], lambda x: x @ head.T, terms.weights, top=5)
        total = total + plan.weights[step] * part.total
        for name, value in part.terms.items():
            torch.testing.assert_close(got.terms[f"{name}.{step}" if step else name], value)
    torch.testing.assert_close(got.total, total)
    for one, other in zip(torch.autograd.grad(got.total, steps), torch.autograd.grad(total, steps), strict=True):
        torch.testing.assert_close(one, other)
    assert got.terms["kept.2"] == len(kept_of[2]) / place.shape[1]
    if select != "none":
        assert 0 < len(kept_of[2]) < len(kept_of[1]) < len(kept_of[0])


def test_a_step_that_nobody_survived_costs_nothing():
    lesson, _ = lesson_of([])
    steps = tuple(torch.randn(7, 4, requires_grad=True) for _ in range(3))
    head = torch.eye(4)
    flipped = replace(lesson, steps=steps, teacher=-steps[0].detach() * 100)
    got = lesson_losses(flipped, lambda x: x @ head.T, Objective(), Unroll(steps=3, select="chain", hit=1), 100)
    assert got.terms["kept.1"] == 0
    gradients = torch.autograd.grad(got.total, steps)
    assert gradients[1].abs().max() == gradients[2].abs().max() == 0
    assert torch.isfinite(got.total)


# --- noise


def noisy_outputs(draw: int, noise: float = 0.2) -> tuple[Tensor, ...]:
    drafter, features = made("eaglevlm", "llava"), taught("llava")
    student = Student(drafter, torch.float64, Unroll(steps=2), noise)
    with torch.no_grad():
        return student(features, features.embeds, draw)[0]


def test_noise_is_a_function_of_its_draw():
    one, same, other, none = noisy_outputs(1), noisy_outputs(1), noisy_outputs(2), noisy_outputs(1, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], none[0])


@pytest.mark.parametrize("method", ["eaglevlm", "hivis"])
def test_noise_has_the_published_width(method):
    """(U - 0.5) * scale * 512 / rows, on the features that the drafter reads and nothing else."""
    drafter, features = made(method, "llava"), taught("llava")
    fed: list[Rows] = []
    drafter.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    for noise in (0.0, 0.2):
        Student(drafter, torch.float64, None, noise)(features, features.embeds, 5)
    clean, noisy = fed
    assert torch.equal(clean.embeds, noisy.embeds)
    for sequence, length in enumerate((clean.source >= 0).sum(1).tolist()):
        added = (noisy.hidden - clean.hidden)[sequence, :length]
        half = 0.5 * 0.2 * 512 / length
        assert 0.95 * half < added.abs().max() <= half
        assert abs(added.mean()) < 0.1 * half


# --- in the trainer


@pytest.mark.parametrize("select", ["none", "chain", "public"])
def test_a_resumed_run_with_noise_and_steps_is_the_uninterrupted_one(select, tmp_path):
    changes = {
        "drafter": {"method": "hivis"},
        "unroll": {"steps": STEPS, "select": select},
        "feature_noise": 0.2,
        "batch_size": 1,
        "accumulation": 2,
        "save_every": 2,
    }
    lender, rows = speaker("llava"), answered("llava")
    train(recipe(tmp_path / "whole", steps=5, **changes), target=lender, rows=rows)

    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train(recipe(tmp_path / "parts", steps=5, **changes), target=lender, rows=rows, on_event=kill)
    train(recipe(tmp_path / "parts", steps=5, **changes), target=lender, rows=rows, resume_from="latest")
    states = [load_drafter(tmp_path / name / "last").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    line = events_of(tmp_path / "whole", "step")[-1]
    assert all(math.isfinite(line[name]) for name in ("loss", "soft_ce.2", "agreement.1", "kept.2"))


def test_one_step_gives_the_losses_of_the_plain_objective():
    lender, rows = target("llava"), answered("llava")
    encoder = Encoder(lender, 4096)
    batch = collate([encoder.row(row) for row in rows], 0, torch.float64)
    lesson = distil(Student(made("eaglevlm", "llava"), torch.float64), lender, batch)
    terms = Objective()
    got = lesson_losses(lesson, lender.logits, terms, Unroll(), 7)
    plain = objective(lesson.steps[0], lesson.teacher, lender.logits, terms.weights, chunk=7)
    assert got.total == plain.total
    assert got.terms == plain.terms
    nobody = replace(lesson, steps=(lesson.steps[0][:0],) * 2, teacher=lesson.teacher[:0], place=lesson.place[:, :0])
    figures = lesson_losses(nobody, lender.logits, terms, Unroll(steps=2, select="chain"), 7)
    assert figures.total == figures.terms["kept.1"] == 0


def test_a_second_stage_starts_from_the_first(tmp_path):
    lender, rows = speaker("qwen2_5_vl"), answered("qwen2_5_vl")
    one = {"method": "hivis", "options": {"steps": 1}}
    first = train(recipe(tmp_path / "one", steps=2, drafter=one), target=lender, rows=rows)
    start = {"method": "hivis", "init_from": str(first)}
    second = make_drafter(read_recipe({"target": "t", "output": "o", "steps": 1, "drafter": start}).drafter, lender)
    earlier = load_drafter(first).state_dict()
    for name, weight in second.state_dict().items():
        assert torch.equal(weight, earlier[name].expand_as(weight) if name == "residual" else earlier[name])
    assert second.residual.shape[0] == 3
    with pytest.raises(UserError, match=r"cannot start from these weights: fc.weight, residual do not fit"):
        make_drafter(DrafterRecipe("eaglevlm", init_from=str(first)), lender)
    with pytest.raises(UserError, match="must be a trained drafter"):
        make_drafter(DrafterRecipe("eaglevlm", init_from="lookup"), lender)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"unroll": {"steps": 0}}, "unroll.steps must be above 0"),
        ({"unroll": {"attention": "exat"}}, "did you mean exact"),
        ({"unroll": {"select": "chains"}}, "did you mean chain"),
        ({"unroll": {"steps": 2, "weights": [1]}}, "unroll.weights are 1 numbers for 2 steps"),
        ({"feature_noise": -1}, "feature_noise must not be below 0"),
    ],
)
def test_a_mistake_is_named(section, said):
    with pytest.raises(UserError, match=said):
        read_recipe({"target": "t", "output": "o", "steps": 1, "drafter": {"method": "hivis"}} | section)
