"""A pass of training reads nothing back from the device, but for what transformers itself checks."""

from __future__ import annotations

import copy

import pytest
import torch

import pretend
import tiny
from speculens.drafters import METHODS, layer
from speculens.targets import Target
from speculens.targets.attention import install_attention
from speculens.targets.segments import join_segments
from speculens.training.batches import Batch, Encoder
from speculens.training.config import Objective, Unroll, read_recipe
from speculens.training.student import Student, distil, make_drafter
from speculens.training.unroll import lesson_losses

# How each method practises; one that is not named here drafts three steps and drops those that did not survive.
PLANS = {"eaglevlm": Unroll(), "vispec": Unroll(steps=2, attention="causal")}
PRACTICE = Unroll(steps=3, select="chain", hit=5)
TERMS = Objective(smooth_l1=1.0, soft_ce=0.1, topk_ce=1.0, list_mle=0.1, prob_l1=1.0)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Numbers kept for each device: those of the pretended one are not those of the device that it stands on."""
    layer._frequencies.cache_clear()
    yield
    layer._frequencies.cache_clear()


def a_pass(family: str, method: str, options: dict) -> pretend.Waits:
    """Forward, losses and backward of one batch: two rows, one with two pictures."""
    model = copy.deepcopy(tiny.model(family, torch.float32))
    install_attention(model)
    join_segments(model)
    target = Target(model, tiny.processor(family))
    made = read_recipe({"target": "t", "output": "o", "steps": 1, "drafter": {"method": method, "options": options}})
    drafter = make_drafter(made.drafter, target)
    batch = a_batch(target)
    with pretend.pretend():
        pretend.move(model)
        pretend.move(drafter)
    plan = PLANS.get(method, PRACTICE)
    student = Student(drafter, torch.float32, plan, noise=0.2)
    with pretend.pretend() as waits:
        lesson_losses(distil(student, target, batch), target.logits, TERMS, plan, chunk=64).total.backward()
    return waits


def a_batch(target: Target) -> Batch:
    encoder = Encoder(target, 4096)
    asked = [tiny.conversation(images=count, seed=count) for count in (1, 2)]
    batch = encoder.batch(
        [encoder.row(one.then("assistant", "Two circles. " * (3 - i))) for i, one in enumerate(asked)]
    )
    assert batch.positions
    return batch


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        *(("qwen2_5_vl", method, {}) for method in METHODS),
        *(("llava", "specvlm", {"mode": mode}) for mode in ("weighted", "concat")),
        ("llava_next", "hivis", {"border": "vllm"}),
    ],
)
def test_a_pass_waits_for_nothing_of_ours(family, method, options):
    found = a_pass(family, method, options).found
    assert not [one for one in found if "/transformers/" not in one[1].split(" < ")[0]]
    assert 0 < found.total() <= 3, found  # 0 would mean that nothing is noticed any more


def test_what_waits_is_noticed():
    with pretend.pretend() as waits:
        x = torch.arange(6).to(pretend.DEVICE, non_blocking=True)
        y = (x * 2).to("cpu")
        assert y.tolist() == [0, 2, 4, 6, 8, 10]
        x[x > 2], x[torch.tensor([1])], x.tolist(), int(x[1]), torch.tensor(3, device=pretend.DEVICE)
    assert sorted(what for what, _ in waits.found.elements()) == [
        "_local_scalar_dense",
        *2 * ["an index that is a mask, or the host's"],
        "sent from the host",
        "sent to the host",
        "tolist",
    ]
