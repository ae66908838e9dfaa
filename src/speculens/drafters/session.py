"""A trained drafter at work: its own KV cache, draft trees by self-feeding, re-entry of what was accepted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from speculens.attention import TreeMask, causal_attention, tree_attention
from speculens.cache import SlotCache
from speculens.drafters.base import Lender, Prefilled
from speculens.drafters.config import DrafterConfig
from speculens.drafters.grow import grow, likeliest
from speculens.drafters.layer import rotary
from speculens.drafters.rows import Rows
from speculens.errors import UserError
from speculens.features import Features
from speculens.fused_layer import Attend, FusedLayer
from speculens.int8 import Int8Linear
from speculens.tree import DraftTree, TreeShape, take_last


class Head(Protocol):
    """What a session asks of a method: its view of the prompt, what enters its layer, and the layer."""

    config: DrafterConfig
    d2t: Tensor | None

    @property
    def is_pressed(self) -> bool: ...
    def view(self, features: Features, next_embeds: Tensor) -> Rows: ...

    def enter(self, rows: Rows, step: int = 0) -> Tensor: ...
    def fused(self) -> FusedLayer: ...


class HeadSession:
    """Drafter KV of true target features only; what is drafted lives in scratch columns above it."""

    def __init__(self, drafter: Head, target: Lender, slots: int, capacity: int, shape: TreeShape) -> None:
        config = drafter.config
        self.drafter, self.target, self.shape = drafter, target, shape
        self.nodes = shape.nodes
        self._ids = _checked(drafter.d2t, target)
        self._head = _head(drafter, target, self._ids)
        vocabulary = target.vocab_size if self._ids is None else len(self._ids)
        if shape.topk > vocabulary:
            raise UserError(f"topk {shape.topk} is larger than the draft vocabulary of {vocabulary}.")
        self.cache = SlotCache(
            slots=slots,
            capacity=capacity + shape.scratch,
            heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=target.dtype,
            devices=[target.device],
        )
        self._hidden = torch.zeros(slots, target.hidden_size, dtype=target.dtype, device=target.device)
        self._position = torch.zeros(slots, dtype=torch.long, device=target.device)
        self._memory = torch.zeros_like(self._hidden)
        self._horizon = 0  # of the pass at hand; no view has more rows than the target
        # What every pass would compute again: numbers, rotations of all positions there can be, (2, positions, d), and
        # who sees whom among rows in a line.
        self._numbers = torch.arange(self.cache.capacity, device=target.device)
        self._turns = torch.stack(rotary(self._numbers, config.head_dim, config.rope_theta, target.dtype))
        self._before = torch.ones(shape.scratch, shape.scratch, dtype=torch.bool, device=target.device).tril()
        self.state = (self.cache.lengths, self._hidden, self._position)
        self.nbytes = self.cache.nbytes

    @torch.no_grad()
    def begin(self, features: Features, first: Tensor) -> Prefilled:
        """Prefill the drafter on its view of the prompt."""
        next_embeds = torch.cat([features.embeds[:, 1:], self.target.embed(first)[:, None]], dim=1)
        rows = self.drafter.view(features, next_embeds)
        count = rows.positions.shape[1]
        with self.cache.opening() as row:
            self.cache.aim(range(row, row + 1), count)
            output = self._run(rows, self._turns[:, rows.positions], causal_attention, step=0)
            self.cache.commit(count)
            self.cache.settle([count], row)
        self._hidden[row] = output[0, -1]
        self._position[row] = rows.positions[0, -1] + 1
        if rows.memory is not None:
            self._memory[row] = rows.memory[0, -1]
        return Prefilled(count, rows.notes[0] if rows.notes else {})

    @torch.no_grad()
    def draft(self, roots: Tensor, shape: TreeShape | None = None, horizon: int = 0) -> DraftTree:
        shape, batch = shape or self.shape, len(roots)
        positions = self._position[:batch] + self._numbers[: shape.num_steps, None]  # of all levels, (levels, B)
        positions = positions[..., None].expand(-1, -1, shape.topk)
        turns = self._turns[:, positions]
        self._horizon = horizon

        def expand(tokens: Tensor, hidden: Tensor, level: int, lineage: Tensor) -> Tensor:
            """Self-fed: the feature of a drafted token's slot is the drafter's own output at its parent."""
            rows = self._rows(tokens, hidden, positions[level])
            return self._extend(rows, turns[:, level], lineage, start=level * shape.topk, step=level + 1)

        return grow(roots, self._hidden[:batch], self._propose, expand, shape)

    @torch.no_grad()
    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor, horizon: int = 0) -> None:
        """Accepted tokens re-enter with the target's own features; KV of drafted features is overwritten.

        What lies beyond a slot's count enters too, behind all that counts, so that it is seen by nothing that is kept.
        """
        batch, width = tokens.shape
        positions = self._position[:batch, None] + self._numbers[:width]
        before = self._before[:width, :width].expand(batch, -1, -1)
        self._horizon = horizon
        output = self._extend(self._rows(tokens, hidden, positions), self._turns[:, positions], before)
        self.cache.commit(counts)
        take_last(self._hidden[:batch], output, counts)
        self._position[:batch].add_(counts)

    def settle(self, accepted: Sequence[Sequence[int]]) -> None:
        """The host's side of the cache follows."""
        self.cache.settle([len(tokens) for tokens in accepted])

    def free(self, row: int) -> None:
        """Forget a slot; the row left over holds no number that could spread."""
        last = self.cache.running - 1
        for part in (self._hidden, self._position, self._memory):
            part[row] = part[last]
            part[last].zero_()
        self.cache.free(row)

    def _propose(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return likeliest(self.target.logits(hidden, self._head), count, self._ids)

    def _rows(self, tokens: Tensor, hidden: Tensor, positions: Tensor) -> Rows:
        memory = self._memory[: len(tokens), None].expand_as(hidden)
        return Rows(self.target.embed(tokens), hidden, positions, memory=memory)

    def _extend(self, rows: Rows, turn: Tensor, newest: Tensor, start: int = 0, step: int = 0) -> Tensor:
        """The layer over new columns `start` .. of every running slot; newest (B, m, M) masks the M newest columns."""
        batch, width = rows.positions.shape
        self.cache.aim(range(batch), width, start, self._horizon)
        return self._run(rows, turn, partial(tree_attention, mask=TreeMask(self.cache.aimed, newest)), step)

    def _run(self, rows: Rows, turn: Tensor, attend: Attend, step: int) -> Tensor:
        """The layer over rows (B, m), turned by (2, B, m, d), where the cache was last aimed -> (B, m, H)."""
        cos, sin = turn
        stream, update = self.drafter.fused()(self.drafter.enter(rows, step), None, (cos, sin), self.cache, 0, attend)
        return stream + update


def _head(drafter: Head, target: Lender, ids: Tensor | None) -> nn.Linear | Int8Linear | None:
    """What turns features into the tokens that are drafted, unless that is the target's own head."""
    some = None if ids is None else target.head_rows(ids)
    whole = target.head if some is None else some
    return Int8Linear(whole) if drafter.is_pressed and type(whole) is nn.Linear else some


def _checked(ids: Tensor | None, target: Lender) -> Tensor | None:
    """A draft vocabulary on the target's device. No token stands twice: siblings must differ (`DraftTree`)."""
    if ids is None:
        return None
    if ids.min() < 0 or ids.max() >= target.vocab_size or len(ids.unique()) < len(ids):
        raise UserError("The drafter's d2t must hold different ids of the target's vocabulary: make it again by trim.")
    return ids.to(target.device)
