"""A pass of training reads nothing back from the device, but for what transformers itself checks."""

from __future__ import annotations

import copy

import pytest
import torch

import pretend
import tiny
from speculens.targets import Target
from speculens.targets.attention import install_attention
from speculens.targets.segments import join_segments
from speculens.training.batches import Batch, Encoder
from speculens.training.config import Objective, Unroll, read_recipe
from speculens.training.student import Student, distil, make_drafter
from speculens.training.unroll import lesson_losses

PLANS = {
    "eaglevlm": Unroll(),
    "specvlm": Unroll(),
    "vispec": Unroll(steps=2, attention="causal"),
    "hivis": Unroll(steps=3, select="chain", hit=5),
}
TERMS = Objective(smooth_l1=1.0, soft_ce=0.1, topk_ce=1.0, list_mle=0.1, prob_l1=1.0)


def a_pass(family: str, method: str, options: dict) -> pretend.Pretence:
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
    student, plan = Student(drafter, torch.float32, PLANS[method], noise=0.2), PLANS[method]
    with pretend.pretend() as pretence:
        lesson_losses(distil(student, target, batch), target.logits, TERMS, plan, chunk=64).total.backward()
    return pretence


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
        *(("qwen2_5_vl", method, {}) for method in PLANS),
        *(("llava", "specvlm", {"mode": mode}) for mode in ("weighted", "concat")),
        ("llava_next", "hivis", {"border": "vllm"}),
    ],
)
def test_a_pass_waits_for_nothing_of_ours(family, method, options):
    waits = a_pass(family, method, options).waits
    assert not [place for _, place in waits if "transformers/" not in place.split(" < ")[0]]
    assert 0 < waits.total() <= 3, waits  # 0 would mean that nothing is noticed any more
