"""K steps of a drafter over whole sequences, the later ones on its own output (arXiv 2408.15766 and 2509.23928).

Step 0 reads the target's features. Step k reads, at row t, the output of step k - 1 at row t - 1, as drafting does:
the feature of a drafted token's row is the drafter's own output at its parent. Tokens are the text's own throughout, so
each row t >= k of step k stands for a chain of k drafted tokens that began behind the target's feature of row t - k.

    attention exact, m = 5 rows, query of step k = 2 at row t = 3; keys are (step, row)

    step 0   o---o---+   +   +     true features up to t - k = 1: rows 0 and 1
    step 1   +   +   o   +   +     the chain's first drafted row, t - k + 1 = 2
    step 2   +   +   +   o   +     the row itself

    keys and values of the three steps  (B, heads, 15, d)    the m rows of step 0, then of 1, then of 2
    mask                                (5, 15)              [s <= t - 2 | s == t - 1 | s == t]

This is to the key what drafting sees of one chain, for all m chains at once: one attention a step, over (k + 1) m keys.
Rows t < k began before the sequence and stand for nothing; they are fed the true feature of row 0 and never train.
With attention `causal` (arXiv 2509.15235) step k is a plain causal pass over all the features that it is fed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speculens.attention import causal_attention
from speculens.drafters import TrainedDrafter
from speculens.drafters.layer import masked_attention
from speculens.drafters.rows import Rows, behind
from speculens.training.config import Objective, Unroll
from speculens.training.losses import Head, Losses, objective


def unroll(drafter: TrainedDrafter, rows: Rows, plan: Unroll) -> tuple[Tensor, ...]:
    """The outputs (B, m, H) of each of the K steps."""
    attend = _Chains() if plan.attention == "exact" and plan.steps > 1 else causal_attention
    outputs = [drafter(rows, attend)]
    for step in range(1, plan.steps):
        before = outputs[-1].detach() if plan.detach else outputs[-1]
        own = torch.cat([rows.hidden[:, :1], before[:, :-1]], dim=1)
        outputs.append(drafter(replace(rows, hidden=own), attend, step))
    return tuple(outputs)


class _Chains:
    """Attention of one step after another: each sees of the earlier ones what its chains do. Called once a step."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self._keys.append(keys)
        self._values.append(values)
        if len(self._keys) == 1:
            return causal_attention(queries, keys, values)
        allowed = chain_mask(queries.shape[2], len(self._keys) - 1, queries.device)
        return masked_attention(queries, torch.cat(self._keys, 2), torch.cat(self._values, 2), allowed[None])


def chain_mask(rows: int, step: int, device: torch.device | None = None) -> Tensor:
    """(m, (step + 1) m) bool: which keys of steps 0 .. step the queries of `step` see."""
    query = torch.arange(rows, device=device)[:, None]
    key = query.T
    diagonals = [key == query - step + one for one in range(1, step + 1)]
    return torch.cat([key <= query - step, *diagonals], dim=1)


@dataclass(frozen=True)
class Lesson:
    """What one pass of target and student gave, at the P positions that train.

    steps    K tensors (P, H), the features predicted at each step
    teacher  (P, H) the target's
    place    (2, P) long: sequence and row of each position among the student's rows
    shape    B and m, of all those rows
    """

    steps: tuple[Tensor, ...]
    teacher: Tensor
    place: Tensor
    shape: tuple[int, int]


class Selection:
    """Which positions each step trains: `select` of the plan.

    hit_k is true at rows that train and whose target token is among the drafter's likeliest at step k.
    chain   step k trains row t iff hit_0[t - k], hit_1[t - k + 1] .. hit_{k-1}[t - 1]: the chain that it belongs to
    public  step k trains row t iff hit_0[t - k + 1] .. hit_{k-1}[t], as the public code of arXiv 2509.23928 has it
    """

    def __init__(self, lesson: Lesson, plan: Unroll) -> None:
        self._lesson, self._select = lesson, plan.select
        self._alive: Tensor | None = None  # (B, m) bool: every step so far was a hit along the chain that ends here

    def kept(self, step: int) -> Tensor | None:
        """(P,) bool, or None for all of them. Step k needs the hits of the steps before it."""
        row, place = self._lesson.place
        if step == 0:
            return None
        begun = place >= step
        if self._alive is None:
            return begun
        alive = behind(self._alive) if self._select == "chain" else self._alive
        return begun & alive[row, place]

    def observe(self, hits: Tensor) -> None:
        """(P,) bool of the newest step."""
        row, place = self._lesson.place
        table = torch.zeros(self._lesson.shape, dtype=torch.bool, device=hits.device)
        table[row, place] = hits
        self._alive = table if self._alive is None else table & behind(self._alive)


def lesson_losses(lesson: Lesson, head: Head, terms: Objective, plan: Unroll, chunk: int) -> Losses:
    """The objective of every step, each a mean over the positions that the step trains, summed by the plan's weights.

    The first step's figures have the terms' own names, those of step k end in `.k`; `kept.k` is the share it trains.
    """
    selection = Selection(lesson, plan)
    total, figures = lesson.teacher.new_zeros((), dtype=torch.float32), {}
    for step, predicted in enumerate(lesson.steps):
        kept = selection.kept(step)
        hit = plan.hit if plan.select != "none" and step + 1 < len(lesson.steps) else 0
        found = objective(
            predicted, lesson.teacher, head, terms.weights, top=terms.top, chunk=chunk, kept=kept, hit=hit
        )
        if hit:
            selection.observe(found.hits)
        total = total + (plan.weights[step] if plan.weights else 1.0) * found.total
        if kept is None:
            first, figures = found, dict(found.terms)
        else:
            figures |= {f"{name}.{step}": value for name, value in found.terms.items()}
            figures |= {f"agreement.{step}": found.agreement, f"kept.{step}": kept.sum() / max(len(kept), 1)}
    return replace(first, total=total, terms=figures)
