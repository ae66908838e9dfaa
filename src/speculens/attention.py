"""Attention of new rows over a prefix and each other: those of a draft tree, of a drafter that grows one, of a prompt.

    columns of slot b    0 .. length - 1      length .. length + M - 1     beyond
    row i sees           all of them          those that newest[b, i] marks    nothing

That is all there is to the mask, so a kernel can do without one: on a GPU, `kernels.py` reads lengths and `newest`
themselves and does work in proportion to the true length. In plain torch the mask is built, once for all layers, and
the head group is folded into the query axis: keys and values are never repeated per query head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from speculens.ops import kernels_for
from speculens.tree import tree_mask

# cuDNN, which torch prefers on some devices, is left out: it plans anew for each shape, a tenth of a second and more,
# and prompts and pictures come in all sizes.
_FOR_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class TreeMask:
    """Who sees whom in one pass, for all layers.

    lengths  (B,) committed columns of each slot
    newest   (B, N, M) bool, which of the M columns from there on row i sees
    depth    (B, N) of the rows; only layers with a sliding window ask for it
    """

    lengths: Tensor
    newest: Tensor
    depth: Tensor | None = None
    _made: dict[tuple[int, torch.dtype, int, int | None], Tensor] = field(default_factory=dict, repr=False)

    def additive(self, columns: int, dtype: torch.dtype, repeats: int = 1, window: int | None = None) -> Tensor:
        """(B, 1, repeats * N, columns): 0 where a row sees a column, else the lowest number; made once."""
        key = (columns, dtype, repeats, window)
        if key not in self._made:
            allowed = tree_mask(self.lengths, self.newest, columns, self.depth, window)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            mask = mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
            self._made[key] = mask.repeat(1, 1, repeats, 1) if repeats > 1 else mask
        return self._made[key]


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: TreeMask,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend with queries (B, heads, N, d), keys and values (B, kv_heads, columns, d) -> (B, heads, N, d).

    scale   of the scores; by default 1 / sqrt(d)
    window  of a layer with a sliding window, in positions
    """
    if kernels := kernels_for(queries):
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        depth = mask.depth if window is not None else None
        return kernels.attend(queries, keys, values, mask.lengths, mask.newest, scale, depth=depth, window=window)
    additive = mask.additive(keys.shape[2], queries.dtype, queries.shape[1] // keys.shape[1], window)
    return folded_attention(queries, keys, values, additive, scale)


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Attend with rows that are the last of the columns: each sees itself and all before it.

    Shapes as in `tree_attention`. Where rows are padded on the right, that harms nobody.
    window  of a layer with a sliding window; there must be no more columns than that
    """
    rows, columns = queries.shape[2], keys.shape[2]
    if window is not None and columns > window:
        raise ValueError(f"a sliding window of {window} positions hides some of {columns} columns")
    if rows == columns:
        return plain_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    mask = causal_lower_right(rows, columns)
    return F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)


def folded_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention under any mask without repeating keys and values: the head group joins the query axis.

    mask  bool or additive, (B, 1, N, columns), or (B, 1, G N, columns) for the G query heads of a group
    """
    batch, heads, rows, dim = queries.shape
    groups = heads // keys.shape[1]
    if mask.shape[2] not in (rows, groups * rows):  # repeated, it might fit and let rows see what others may
        raise ValueError(f"a mask of {mask.shape[2]} rows is none for {rows} rows in groups of {groups}")
    folded = queries.reshape(batch, keys.shape[1], groups * rows, dim)
    mask = mask if mask.shape[2] == groups * rows else mask.repeat(1, 1, groups, 1)
    mixed = plain_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return mixed.view(batch, heads, rows, dim)


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """The attention of torch, with its options, by kernels that take a shape as it comes."""
    with for_any_shape(queries.device):
        return F.scaled_dot_product_attention(queries, keys, values, **options)


def for_any_shape(device: torch.device) -> AbstractContextManager[None]:
    """A block in which torch's attention does without cuDNN's kernels, which are planned anew for each new shape."""
    return sdpa_kernel(_FOR_ANY_SHAPE) if device.type == "cuda" else nullcontext()
