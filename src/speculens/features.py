"""What crosses from the target to the drafter, and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What the frozen target reveals after one pass over B sequences of up to n rows, padded on the right.

    `hidden` and `embeds` are on the target's device. All else tells where things stand and is on the host: it was known
    before the pass, so a view is laid out without waiting for the device.

    hidden     (B, n, H) last hidden states, after the final norm
    embeds     (B, n, H) what entered the decoder: token embeddings, and projected visual features at image rows
    tokens     (B, n) long, with image placeholders where the picture stands
    positions  (B, n) long, plain sequence index (never M-RoPE)
    image      (B, n) bool, True where the row is part of a picture
    lengths    (B,) long, rows beyond it are padding
    answer     (B, n) bool, True at the rows of answers that are being learnt; None in decoding
    """

    tokens: Tensor
    hidden: Tensor
    embeds: Tensor
    positions: Tensor
    image: Tensor
    lengths: Tensor
    answer: Tensor | None = None
