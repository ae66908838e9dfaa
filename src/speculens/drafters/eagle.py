"""EagleVLM: the EAGLE-2 head that sees every visual token (the baseline of SpecVLM, arXiv 2509.11815, section 3.1).

    slot i holds (embedding of token i+1, target feature f_i) and predicts f_{i+1};
    the target's head on that prediction drafts token i+2.

At image rows the embedding is what entered the target's decoder there: the projected visual feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speculens.cache import SlotCache
from speculens.drafters.base import DraftSession, Lender
from speculens.drafters.config import DrafterConfig
from speculens.drafters.grow import grow
from speculens.drafters.layer import Attend, DecoderLayer, causal_attention, masked_attention
from speculens.errors import UserError
from speculens.features import Features
from speculens.tree import DraftTree, TreeShape, tree_mask


@dataclass(frozen=True)
class Rows:
    """What a drafter keeps of a prompt: the rows that enter its layer, padded on the right.

    inputs     (B, m, H) fused embedding and feature
    positions  (B, m) long, for RoPE
    source     (B, m) long, the prompt slot i each row stands for, -1 at padding
    """

    inputs: Tensor
    positions: Tensor
    source: Tensor


class EagleDrafter(nn.Module):
    """One decoder layer on `[embedding ; feature]`. Embedding and head are the target's own and are never stored."""

    name = "eaglevlm"
    image_contract = "full"

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.target_hidden_size, config.target_hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config)])

    def fuse(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """[e ; f] -> what enters the layer: (..., H)."""
        return self.fc(torch.cat([embeds, hidden], dim=-1))

    def rows(self, features: Features, next_embeds: Tensor) -> Rows:
        """The view. Here: every row, visual ones included.

        next_embeds  (B, n, H), layer-0 input of the token after each row
        """
        inside = features.positions < features.lengths[:, None]
        source = torch.where(inside, features.positions, -1)
        return Rows(self.fuse(next_embeds, features.hidden), features.positions, source)

    def forward(self, inputs: Tensor, positions: Tensor, attend: Attend = causal_attention) -> Tensor:
        """Fused rows (B, m, H) at positions (B, m) -> predicted features (B, m, H)."""
        return self.layers[0](inputs, positions, attend)

    def session(self, target: Lender, slots: int, capacity: int, shape: TreeShape | None = None) -> DraftSession:
        """Room for `slots` sequences; raises UserError if this drafter was made for another target."""
        check_fit(self.config, target)
        return EagleSession(self, target, slots, capacity, shape or self.config.tree)

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows."""
        parameters = sum(p.numel() for p in self.parameters())
        return {"drafter": self.name, "parameters": parameters, **self.config.to_dict()}


def check_fit(config: DrafterConfig, target: Lender) -> None:
    """Refuse a drafter that was made for another target, with both numbers."""
    for what, made_for, given in (
        ("hidden size", config.target_hidden_size, target.hidden_size),
        ("vocabulary", config.target_vocab_size, target.vocab_size),
        ("family", config.target_family, target.family),
    ):
        if made_for != given:
            raise UserError(f"This drafter was made for a target of {what} {made_for}, but this target has {given}.")


class EagleSession:
    """Drafter KV of true target features only; what is drafted lives in scratch columns above it."""

    def __init__(self, drafter: EagleDrafter, target: Lender, slots: int, capacity: int, shape: TreeShape) -> None:
        config = drafter.config
        self.drafter, self.target, self.shape = drafter, target, shape
        self.nodes = shape.nodes
        if shape.topk > target.vocab_size:
            raise UserError(f"topk {shape.topk} is larger than the vocabulary of {target.vocab_size}.")
        self.cache = SlotCache(
            slots=slots,
            capacity=capacity + shape.levels + 1 + shape.num_steps * shape.topk,
            heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=target.dtype,
            devices=[target.device],
        )
        self._hidden = torch.zeros(slots, target.hidden_size, dtype=target.dtype, device=target.device)
        self._position = torch.zeros(slots, dtype=torch.long, device=target.device)

    @torch.no_grad()
    def begin(self, features: Features, first: Tensor) -> None:
        """Prefill the drafter on its view of the prompt."""
        next_embeds = torch.cat([features.embeds[:, 1:], self.target.embed(first)[:, None]], dim=1)
        rows = self.drafter.rows(features, next_embeds)
        count = rows.inputs.shape[1]
        with self.cache.opening() as row:
            self.cache.aim(range(row, row + 1), count)
            output = self.drafter(rows.inputs, rows.positions, self._causal)
            self.cache.commit(range(row, row + 1), [count])
        self._hidden[row] = output[0, -1]
        self._position[row] = features.tokens.shape[1]

    @torch.no_grad()
    def draft(self, roots: Tensor) -> DraftTree:
        return grow(roots, self._hidden[: len(roots)], self._propose, self._expand, self.shape)

    @torch.no_grad()
    def observe(self, hidden: Tensor, tokens: Tensor, counts: Sequence[int]) -> None:
        """Accepted tokens re-enter with the target's own features; KV of drafted features is overwritten."""
        batch, width = len(counts), max(counts)
        offsets = torch.arange(width, device=tokens.device)
        before = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril().expand(batch, -1, -1)
        inputs = self.drafter.fuse(self.target.embed(tokens[:, :width]), hidden[:, :width])
        output = self._run(inputs, self._position[:batch, None] + offsets, 0, before)
        self.cache.commit(range(batch), counts)
        taken = torch.tensor(counts, device=tokens.device)
        self._hidden[:batch] = output[torch.arange(batch, device=tokens.device), taken - 1]
        self._position[:batch] += taken

    def free(self, row: int) -> None:
        last = self.cache.running - 1
        self._hidden[row] = self._hidden[last]
        self._position[row] = self._position[last]
        self.cache.free(row)

    def _propose(self, hidden: Tensor) -> Tensor:
        return self.target.logits(hidden).float().log_softmax(-1)

    def _expand(self, tokens: Tensor, hidden: Tensor, level: int, lineage: Tensor) -> Tensor:
        """Self-fed: the feature of a drafted token's slot is the drafter's own output at its parent."""
        inputs = self.drafter.fuse(self.target.embed(tokens), hidden)
        positions = (self._position[: len(tokens), None] + level).expand_as(tokens)
        return self._run(inputs, positions, level * self.shape.topk, lineage)

    def _run(self, inputs: Tensor, positions: Tensor, start: int, newest: Tensor) -> Tensor:
        """The layer over new columns `start` .. of every running slot; newest (B, m, M) masks the M newest columns."""
        batch, width = inputs.shape[:2]
        self.cache.aim(range(batch), width, start)
        allowed = tree_mask(self.cache.lengths[:batch], newest, self.cache.columns)

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return masked_attention(queries, *self.cache.write(0, keys, values), allowed)

        return self.drafter(inputs, positions, attend)

    def _causal(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return causal_attention(queries, *self.cache.write(0, keys, values))
