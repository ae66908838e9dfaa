"""The rows of a sequence as a drafter keeps them: what a view makes of the target's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows that enter a drafter's layer, padded on the right. Row j stands for one slot i of the whole sequence.

    embeds     (B, m, H) layer-0 input of the token after the slot
    hidden     (B, m, H) the target's feature at the slot, or the drafter's own guess of it where it feeds itself
    positions  (B, m) long, for RoPE
    source     (B, m) long on the host, the slot i, -1 where a row stands for none (padding, compressed tokens); None
               in decoding
    direct     (B, m) bool, rows whose `embeds` enter the layer as they are, without a feature; None means none
    memory     (B, m, H) what a view remembers of the picture at each later row; None if it remembers nothing
    bias       (B, m) added to a row's scores as a key, for choices that are being learnt; None means 0
    notes      what a view decided, by sequence, for statistics
    """

    embeds: Tensor
    hidden: Tensor
    positions: Tensor
    source: Tensor | None = None
    direct: Tensor | None = None
    memory: Tensor | None = None
    bias: Tensor | None = None
    notes: Sequence[Mapping[str, Any]] = ()


def behind(marked: Tensor) -> Tensor:
    """(B, n) bool: is the row before each one marked?"""
    return torch.cat([torch.zeros_like(marked[:, :1]), marked[:, :-1]], 1)
