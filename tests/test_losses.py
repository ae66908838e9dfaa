from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculens.training.losses import VOCABULARY_TERMS, objective

H, V, P = 8, 50, 23
WEIGHTS = {"smooth_l1": 1.0, "soft_ce": 0.1, "topk_ce": 0.3, "list_mle": 0.2, "prob_l1": 2.0}


def features(seed: int = 0, count: int = P) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher features and a head, float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, head = (
        torch.randn(rows, H, generator=generator, dtype=torch.float64) for rows in (count, count, V)
    )
    return student.requires_grad_(), teacher, head


def plain(student: Tensor, teacher: Tensor, head: Tensor, top: int) -> dict[str, Tensor]:
    """Each term by its formula, position by position."""
    terms: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for guess, truth in zip(student, teacher, strict=True):
        s, t = head @ guess, head @ truth
        q, p = s.exp() / s.exp().sum(), t.exp() / t.exp().sum()
        best = sorted(range(V), key=lambda v: -float(p[v]))[:top]
        terms["smooth_l1"].append(F.smooth_l1_loss(guess, truth))
        terms["soft_ce"].append(-sum(p[v] * q[v].log() for v in range(V)))
        terms["topk_ce"].append(-sum(p[v] * q[v].log() for v in best))
        terms["list_mle"].append(-sum(s[v] - s[best[i:]].logsumexp(0) for i, v in enumerate(best)))
        terms["prob_l1"].append((q - p).abs().sum())
    return {name: torch.stack(values).mean() for name, values in terms.items()}


@pytest.mark.parametrize("name", [*WEIGHTS, "all"])
@pytest.mark.parametrize("chunk", [1, 7, P, 100])
def test_chunked_terms_are_the_plain_formulas_and_so_are_their_gradients(name, chunk):
    student, teacher, head = features()
    weights = WEIGHTS if name == "all" else {name: WEIGHTS[name]}
    losses = objective(student, teacher, lambda x: x @ head.T, weights, top=5, chunk=chunk)
    (gradient,) = torch.autograd.grad(losses.total, student)

    expected = plain(student, teacher, head, top=5)
    total = sum(weight * expected[term] for term, weight in weights.items())
    (true_gradient,) = torch.autograd.grad(total, student)
    for term, value in losses.terms.items():
        torch.testing.assert_close(value, expected[term].detach())
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(gradient, true_gradient)


def test_agreement_counts_equal_likeliest_tokens():
    student, teacher, head = features()
    same = ((student @ head.T).argmax(-1) == (teacher @ head.T).argmax(-1)).double().mean()
    losses = objective(student, teacher, lambda x: x @ head.T, {"soft_ce": 1.0}, chunk=4)
    assert losses.agreement == same
    assert objective(teacher, teacher, lambda x: x @ head.T, {"soft_ce": 1.0}).agreement == 1


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_perfect_student_has_no_gradient(name):
    """Each term is least where student and teacher agree, except ListMLE, which wants the best token ever likelier."""
    _, teacher, head = features()
    student = teacher.clone().requires_grad_()
    losses = objective(student, teacher, lambda x: x @ head.T, {name: 1.0}, top=V)
    (gradient,) = torch.autograd.grad(losses.total, student)
    assert (gradient.abs().max() < 1e-12) == (name != "list_mle")


def test_no_position_costs_nothing():
    student, teacher, head = features(count=0)
    losses = objective(student, teacher, lambda x: x @ head.T, WEIGHTS)
    losses.total.backward()
    assert losses.total == 0


def saved_bytes(count: int, chunk: int) -> int:
    """Bytes that the loss keeps for its backward pass, each storage once."""
    student, teacher, head = features(count=count)
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(student, teacher, lambda x: x @ head.T, {"soft_ce": 1.0, "prob_l1": 1.0}, chunk=chunk)
    return sum(storages.values())


def test_memory_does_not_grow_with_positions_times_vocabulary():
    few, many = saved_bytes(16, 16), saved_bytes(512, 16)
    assert many - few < 512 * H * 8 * 4  # a few tensors of features
    assert many < 512 * V * 8 / 2  # half of one tensor of logits, where the plain formulas keep several


def test_the_backward_pass_holds_one_chunk_of_logits():
    """The recomputation must not keep what earlier chunks needed: logits in flight never exceed a few chunks."""
    alive = most = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, head) -> Tensor:
            nonlocal alive, most
            logits = x @ head.T
            ctx.save_for_backward(logits, head)
            alive += 1
            most = max(most, alive)
            return logits

        @staticmethod
        def backward(ctx, gradient) -> tuple[Tensor, None]:
            nonlocal alive
            alive -= 1
            return gradient @ ctx.saved_tensors[1], None

    student, teacher, head = features(count=64)
    losses = objective(student, teacher, lambda x: Counted.apply(x, head) if x.requires_grad else x @ head.T,
                       {"soft_ce": 1.0}, chunk=8)  # fmt: skip
    alive = most = 0  # the forward pass ran under the checkpoint and kept nothing
    losses.total.backward()
    assert most == 1


def test_every_term_has_a_weight_in_the_recipe():
    assert set(VOCABULARY_TERMS) | {"smooth_l1"} == set(WEIGHTS)
