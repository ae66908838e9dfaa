"""The named terms of the objective, each over answer positions P (weights: the recipe's `objective`).

p is the target's distribution at a position, p̂ the drafter's, f and f̂ the features behind them, V the vocabulary.
Logits over the vocabulary are the memory hog: they exist for one chunk of positions at a time and are computed again in
the backward pass, so peak memory grows with chunk x V, not with P x V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# logits(hidden (c, H)) -> (c, V): the target's frozen head
Head = Callable[[Tensor], Tensor]


def smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """SmoothL1(f̂, f), mean over H: (P, H) twice -> (P,)."""
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


def soft_ce(student: Tensor, teacher: Tensor, _top: int) -> Tensor:
    """-Σ_v p log p̂: logits (c, V) twice -> (c,), as all that follow."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


def topk_ce(student: Tensor, teacher: Tensor, top: int) -> Tensor:
    """-Σ p log p̂ over the target's `top` likeliest tokens (arXiv 2509.23928)."""
    p, best = teacher.softmax(-1).topk(top)
    return -(p * student.log_softmax(-1).gather(-1, best)).sum(-1)


def list_mle(student: Tensor, teacher: Tensor, top: int) -> Tensor:
    """-Σ_i (s_i - logsumexp_{j>=i} s_j), s the drafter's logits of the target's `top` tokens, likeliest first."""
    s = student.gather(-1, teacher.topk(top).indices)
    return (s.flip(-1).logcumsumexp(-1).flip(-1) - s).sum(-1)


def prob_l1(student: Tensor, teacher: Tensor, _top: int) -> Tensor:
    """Σ_v |p̂ - p|, from 0 to 2 (public code of arXiv 2509.15235; its paper prints cross entropy)."""
    return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


VOCABULARY_TERMS = {term.__name__: term for term in (soft_ce, topk_ce, list_mle, prob_l1)}


@dataclass(frozen=True)
class Losses:
    """What one pass came to.

    total      () the weighted sum, to be differentiated
    terms      each term's mean over positions, unweighted and detached
    agreement  () share of positions where drafter and target have the same likeliest token; 0 without logits
    hits       (P,) bool, the target's likeliest token is among the drafter's `hit` likeliest; empty if none was asked
    """

    total: Tensor
    terms: dict[str, Tensor]
    agreement: Tensor
    hits: Tensor


def objective(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    weights: Mapping[str, float],
    *,
    top: int = 10,
    chunk: int = 1024,
    kept: Tensor | None = None,
    hit: int = 0,
) -> Losses:
    """The weighted sum of the named terms over positions.

    student  (P, H) predicted features, the drafter's own dtype
    teacher  (P, H) the target's features of the same positions
    head     the target's, applied to both
    kept     (P,) bool, the positions that train: every mean is over them alone; None means all
    hit      how many of the drafter's likeliest tokens make a hit; 0 asks for none
    """
    count = max(len(student), 1) if kept is None else kept.sum().clamp(min=1)
    student, teacher = _exact(student), teacher.detach()
    means: dict[str, Tensor] = {}
    if "smooth_l1" in weights:
        means["smooth_l1"] = _sum(smooth_l1(student, teacher.to(student.dtype)), kept) / count
    names = tuple(name for name in weights if name in VOCABULARY_TERMS)
    sums = student.new_zeros(len(names) + 1)
    hits = [torch.zeros(0, dtype=torch.bool, device=student.device)]
    for start in range(0, len(student) if names or hit else 0, chunk):
        part = slice(start, start + chunk)
        chosen = None if kept is None else kept[part]
        tensors = (student[part], teacher[part], head, chosen)
        more, found = checkpoint(_chunk, *tensors, names, top, hit, use_reentrant=False, preserve_rng_state=False)
        sums = sums + more
        hits.append(found)
    means |= {name: sums[i] / count for i, name in enumerate(names)}
    total = sum((weights[name] * mean for name, mean in means.items()), start=0.0 * student.sum())
    figures = {name: mean.detach() for name, mean in means.items()}
    return Losses(total, figures, sums[-1].detach() / count, torch.cat(hits))


def _chunk(
    student: Tensor, teacher: Tensor, head: Head, kept: Tensor | None, names: tuple[str, ...], top: int, hit: int
) -> tuple[Tensor, Tensor]:
    """Sums of the vocabulary terms over one chunk, and of agreements, (T + 1,); and its hits, (c,) bool or empty."""
    with torch.no_grad():
        expected = _exact(head(teacher))
    guessed = _exact(head(student.to(teacher.dtype)))
    top = min(top, guessed.shape[-1])
    sums = [_sum(VOCABULARY_TERMS[name](guessed, expected, top), kept) for name in names]
    best = expected.argmax(-1)
    agree = _sum(guessed.argmax(-1) == best, kept).to(guessed.dtype)
    # Of equal logits none counts as better, so `hit` 1 is agreement but for ties.
    better = (guessed > guessed.gather(-1, best[:, None])).sum(-1) if hit else best[:0]
    return torch.stack([*sums, agree]), better < hit


def _sum(values: Tensor, kept: Tensor | None) -> Tensor:
    """Over the positions that are kept."""
    return values.sum() if kept is None else torch.where(kept, values, 0).sum()


def _exact(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
