"""Attention of a vision tower over the segments of all pictures at once.

Towers that take pictures of any size lay their patches end to end and attend within segments: a picture, or a window of
one. Without a flash-attention package, transformers calls attention once a segment, in every layer: thousands of small
calls for a batch of pictures. Segments of one length can share a call. It is registered under a name of its own and
chosen for towers of that kind that would use sdpa.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PreTrainedModel

# transformers hands out the bounds of segments only to attention whose name holds "flash".
NAME = "speculens_segments_as_flash"


def segmented_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Attend with query, key and value (1, heads, T, D) within segments -> (1, T, heads, D).

    cu_seq_lens_q  (S + 1,) bounds of the segments
    """
    mixed = torch.empty_like(query[0])
    for rows in _segments(cu_seq_lens_q):
        q, k, v = (states[0][:, rows].transpose(0, 1) for states in (query, key, value))  # (segments, heads, length, D)
        mixed[:, rows] = F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(0, 1)
    return mixed.transpose(0, 1)[None], None


def _segments(bounds: Tensor) -> list[Tensor]:
    """Rows of the segments of each length, (segments, length). Read once for all layers, which get the same tensor."""
    if bounds not in _known:
        starts: dict[int, list[int]] = {}  # by length
        for start, end in pairwise(bounds.tolist()):
            starts.setdefault(end - start, []).append(start)
        _known[bounds] = [
            torch.tensor(found, device=bounds.device)[:, None] + torch.arange(length, device=bounds.device)
            for length, found in starts.items()
        ]
    return _known[bounds]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # gone with the tensors of a tower's pass

AttentionInterface.register(NAME, segmented_attention)


def join_segments(model: PreTrainedModel) -> None:
    """Let the vision towers of a model use it, where they attend within segments by sdpa."""
    for tower in model.modules():
        if isinstance(tower, PreTrainedModel) and _attends_in_segments(tower):
            # Set where it is kept: the public way takes the name for a package that must be installed.
            tower.config._attn_implementation_internal = NAME  # noqa: SLF001


def _attends_in_segments(tower: PreTrainedModel) -> bool:
    layers = getattr(tower, "blocks", None)
    if not layers or tower.config._attn_implementation != "sdpa":  # noqa: SLF001 - there is no public name for it
        return False
    attention = getattr(layers[0], "attn", None)
    return "cu_seqlens" in inspect.signature(type(attention).forward).parameters if attention is not None else False
