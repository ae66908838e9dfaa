"""EagleVLM: the EAGLE-2 head that sees every visual token (the baseline of SpecVLM, arXiv 2509.11815, section 3.1).

    slot i holds (embedding of token i+1, target feature f_i) and predicts f_{i+1};
    the target's head on that prediction drafts token i+2.

At image rows the embedding is what entered the target's decoder there: the projected visual feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from speculens.attention import causal_attention
from speculens.drafters.base import DraftSession, Lender
from speculens.drafters.config import DrafterConfig
from speculens.drafters.layer import Attend, DecoderLayer
from speculens.drafters.rows import Rows
from speculens.drafters.session import HeadSession
from speculens.errors import UserError
from speculens.features import Features
from speculens.fused_layer import FusedLayer
from speculens.int8 import Int8Linear, press_linears
from speculens.ops import project, send
from speculens.tree import TreeShape


class EagleDrafter(nn.Module):
    """One decoder layer on `[embedding ; feature]`. Embedding and head are the target's own and are never stored."""

    name = "eaglevlm"
    image_contract = "full"

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.target_hidden_size, config.target_hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config)])
        size = config.draft_vocab_size
        self.d2t: Tensor | None
        self.register_buffer("d2t", None if size is None else torch.arange(size))

    def trimmed(self, tokens: Tensor) -> Self:
        """The same weights, drafting `tokens` alone: (V',) long, ids of the target, all different."""
        made = type(self)(replace(self.config, draft_vocab_size=len(tokens)))
        made.load_state_dict({**self.state_dict(), "d2t": tokens})
        return made.to(self.fc.weight.device, next(self.parameters()).dtype)

    def press(self) -> None:
        """Hold what each drafted level reads in 8 bits from now on (`int8.py`); its sessions, a copy of the head.

        For decoding on a GPU in half precision, where it is faster. Not for training.
        """
        press_linears([self, *self.layers.modules()])

    @property
    def is_pressed(self) -> bool:
        """Whether its matrices are held in 8 bits."""
        return isinstance(self.fc, Int8Linear)

    @classmethod
    def settle(cls, options: Mapping[str, Any], model: Any) -> dict[str, Any]:  # noqa: ARG003 - some methods ask it
        """A recipe's options with all that the target decides; `model` is the config of the target's model."""
        return dict(options)

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Start from another drafter's weights, those of an earlier stage; what it does not have stays as it is.

        Its draft vocabulary is not taken over.
        """
        state = {name: weight for name, weight in state.items() if name != "d2t"}
        own = {name: weight.shape for name, weight in self.state_dict().items()}
        if wrong := sorted(name for name, weight in state.items() if own.get(name) != weight.shape):
            raise UserError(f"A {self.name} drafter cannot start from these weights: {', '.join(wrong)} do not fit it.")
        self.load_state_dict(state, strict=False)

    def anneal(self, progress: float) -> None:
        """Training calls this before each update with the share of the run that is over, from 0 to 1."""

    def view(self, features: Features, next_embeds: Tensor) -> Rows:
        """What this drafter keeps of whole sequences. Here: every row, visual ones included.

        next_embeds  (B, n, H), layer-0 input of the token after each row
        """
        inside = features.positions < features.lengths[:, None]
        source = torch.where(inside, features.positions, -1)
        return Rows(next_embeds, features.hidden, send(features.positions, next_embeds.device), source)

    def enter(self, rows: Rows, step: int = 0) -> Tensor:
        """[e ; f] -> what enters the layer: (B, m, H).

        step  0 where `rows.hidden` is the target's own, k at the k-th step on the drafter's own features
        """
        return project(self.fc, torch.cat([rows.embeds, rows.hidden], dim=-1))

    def forward(self, rows: Rows, attend: Attend = causal_attention, step: int = 0) -> Tensor:
        """Rows -> predicted features (B, m, H)."""
        return self.layers[0](self.enter(rows, step), rows.positions, attend)

    def fused(self) -> FusedLayer:
        """The layer that decoding runs on what `enter` gives; `forward` computes the same, and learns."""
        return cast(DecoderLayer, self.layers[0]).fused()

    def session(self, target: Lender, slots: int, capacity: int, shape: TreeShape | None = None) -> DraftSession:
        """Room for `slots` sequences; raises UserError if this drafter was made for another target."""
        self.check(target)
        return HeadSession(self, target, slots, capacity, shape or self.config.tree)

    def check(self, target: Lender) -> None:
        """Raise UserError, with both numbers, if this drafter was made for another target."""
        for what, made_for, given in (
            ("hidden size", self.config.target_hidden_size, target.hidden_size),
            ("vocabulary", self.config.target_vocab_size, target.vocab_size),
            ("family", self.config.target_family, target.family),
        ):
            if made_for != given:
                raise UserError(
                    f"This drafter was made for a target of {what} {made_for}, but this target has {given}."
                )

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows."""
        pressed = [layer for layer in self.modules() if isinstance(layer, Int8Linear)]
        small = [part for layer in pressed for part in (layer.weight, layer.bias) if part is not None]
        parameters = sum(part.numel() for part in (*self.parameters(), *small))
        return {"drafter": self.name, "parameters": parameters, "int8": self.is_pressed, **self.config.to_dict()}
