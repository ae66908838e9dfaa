"""A decoder layer in few, large operations over a model's own weights: what target and drafters decode with.

It serves the common build: pre-norm attention with RoPE and a gated SiLU MLP, as in Llama, Qwen2 and Qwen3. A pass over
a few rows is bound by reading weights and by gaps between kernels, so of some 30 kernels there remain ten. The weights
stay where they are: those of projections on one input are joined, and the model's own become views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from speculens.cache import SlotCache
from speculens.ops import Gains, Joined, add_norm, project, rotate_into, swiglu

# attend(queries (B, heads, N, d), keys and values (B, kv_heads, columns, d), scale=, window=) -> (B, heads, N, d).
# Who sees whom is all that prefill, scoring and tree growth differ in.
Attend = Callable[..., Tensor]
Turn = tuple[Tensor, Tensor]
"""Cosines and sines of the rows' positions, (B, N, d) or (1, N, d) each."""


class Norm(NamedTuple):
    """An RMSNorm: its gain (H,) and epsilon."""

    gain: Tensor
    eps: float


@dataclass(frozen=True)
class FusedLayer:
    """One layer's weights, and how to use them.

    *_norm      before attention and before the MLP; None where the layer has none
    scale       of attention's scores
    window      of a layer with a sliding window, in positions
    gains       of norms on queries and keys, where the layer has them
    """

    input_norm: Norm | None
    qkv: Joined
    output: nn.Module
    post_norm: Norm | None
    gate_up: Joined
    down: nn.Module
    scale: float
    window: int | None = None
    gains: Gains | None = None

    @property
    def intact(self) -> bool:
        """Whether the weights are still those that were joined: casting or moving a model ends that."""
        return self.qkv.intact and self.gate_up.intact

    def __call__(
        self, stream: Tensor, update: Tensor | None, turn: Turn, cache: SlotCache, number: int, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """The layer over new rows, whose keys and values go where the cache was last aimed.

        stream, update  (B, N, H): the residual stream, and what the layer before adds to it. The same returns, so that
                        each addition joins the norm behind it
        number          of the layer in the cache
        """
        stream, rows = _enter(stream, update, self.input_norm)
        states = rotate_into(cache, number, self.qkv(rows), *turn, self.gains)
        mixed = attend(*states, scale=self.scale, window=self.window)
        update = project(self.output, mixed.transpose(1, 2).flatten(2))
        stream, rows = _enter(stream, update, self.post_norm)
        return stream, project(self.down, swiglu(self.gate_up(rows)))


def _enter(stream: Tensor, update: Tensor | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The stream with an update added, and what a block reads of it."""
    if norm:
        return add_norm(stream, update, *norm)
    stream = stream if update is None else stream + update
    return stream, stream
