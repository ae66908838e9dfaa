"""Vision towers that take pictures of any size, without a wait for the device in every layer.

Such towers lay the patches of all pictures end to end and attend within segments: a picture, or a window of one.
Without a flash-attention package, transformers calls attention once a segment, in every layer: thousands of small calls
for a batch of pictures. Segments of one length can share a call. Positions, bounds and order of the patches follow from
the pictures' sizes, which the host knows; transformers reads them back from the device, number by number. Here the host
works them out by the library's own functions and sends them.

The attention is registered under a name of its own and chosen for towers of that kind that would use sdpa.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedModel, vision_utils

from speculens.attention import plain_attention
from speculens.ops import send

# transformers hands out the bounds of segments only to attention whose name holds "flash".
NAME = "speculens_segments_as_flash"
# Towers whose forward takes what `layout` makes, by the model_type of their config. Others read it back themselves.
FORESEEN = tuple(name + end for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") for end in ("", "_vision"))
MOST_SIZES = 16  # whose layouts a tower keeps; those least in use go first


@dataclass(frozen=True)
class _Plan:
    """Segments sorted by length.

    groups  (number of segments, their length), as they follow each other once sorted
    order   (T,) long, the row that stands at each place once sorted; None where they lie so already
    back    its inverse
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    back: Tensor | None


# Every layer is handed the same bounds: they are read once.
_PLANS: Any = WeakIdKeyDictionary()


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

    cu_seq_lens_q  (S + 1,) bounds of the segments, on the host if it is not to be waited for
    """
    plan = _PLANS.get(cu_seq_lens_q)
    if plan is None:
        plan = _PLANS[cu_seq_lens_q] = _plan(cu_seq_lens_q.tolist(), query.device)
    states = tuple(x[0] if plan.order is None else x[0].index_select(1, plan.order) for x in (query, key, value))
    parts, start = [], 0
    for count, length in plan.groups:
        rows = slice(start, start + count * length)
        q, k, v = (x[:, rows].unflatten(1, (count, length)).transpose(0, 1) for x in states)
        mixed = plain_attention(q, k, v, scale=scaling)  # (segments, heads, length, D)
        parts.append(mixed.transpose(1, 2).flatten(0, 1))
        start = rows.stop
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (joined if plan.back is None else joined.index_select(0, plan.back))[None], None


# What is kept may be used under gradients later, whoever made it.
@torch.inference_mode(mode=False)
def _plan(bounds: list[int], device: torch.device) -> _Plan:
    starts: dict[int, list[int]] = {}  # by length
    for start, end in pairwise(bounds):
        starts.setdefault(end - start, []).append(start)
    groups = tuple((len(found), length) for length, found in starts.items())
    if len(starts) == 1:
        return _Plan(groups, None, None)
    order = torch.cat([(torch.tensor(s)[:, None] + torch.arange(length)).flatten() for length, s in starts.items()])
    return _Plan(groups, send(order, device), send(order.argsort(), device))


AttentionInterface.register(NAME, segmented_attention)


def join_segments(model: PreTrainedModel) -> None:
    """Let the vision towers of a model use it, where they attend within segments by sdpa."""
    for tower in model.modules():
        if isinstance(tower, PreTrainedModel) and _attends_in_segments(tower):
            # Set where it is kept: the public way takes the name for a package that must be installed.
            tower.config._attn_implementation_internal = NAME  # noqa: SLF001
            if tower.config.model_type in FORESEEN:
                tower.register_forward_pre_hook(_Foresight(), with_kwargs=True)


def _attends_in_segments(tower: PreTrainedModel) -> bool:
    layers = getattr(tower, "blocks", None)
    if not layers or tower.config._attn_implementation != "sdpa":  # noqa: SLF001 - there is no public name for it
        return False
    attention = getattr(layers[0], "attn", None)
    return "cu_seqlens" in inspect.signature(type(attention).forward).parameters if attention is not None else False


def foresees(model: PreTrainedModel) -> bool:
    """Whether sizes of pictures may stay on the host: every tower of this model that reads them is prepared for it."""
    towers = [one for one in model.modules() if isinstance(one, PreTrainedModel) and hasattr(one, "patch_embed")]
    hooks = (one._forward_pre_hooks.values() for one in towers)  # noqa: SLF001 - there is no public list of them
    return bool(towers) and all(any(isinstance(hook, _Foresight) for hook in of_one) for of_one in hooks)


class _Foresight:
    """A hook that hands its tower what follows from the pictures' sizes. The same sizes mostly come again."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, dict[str, Any]] = OrderedDict()

    def __call__(
        self, tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        grid, device = kwargs["grid_thw"].cpu(), tower.device
        key = device, tuple(map(tuple, grid.tolist()))
        if key not in self._known:
            self._known[key] = layout(tower, grid, device)
            if len(self._known) > MOST_SIZES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return args, self._known[key] | kwargs


@torch.inference_mode(mode=False)
def layout(tower: Any, grid: Tensor, device: torch.device) -> dict[str, Any]:
    """What a tower's forward works out from the sizes (pictures, 3) of its pictures, by the names that it takes.

    Bounds of segments stay on the host, where `segmented_attention` reads them.
    """
    merge = tower.spatial_merge_size
    made: dict[str, Any] = {"position_ids": send(vision_utils.get_vision_position_ids(grid, merge), device)}
    bounds = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
    if hasattr(tower, "window_size"):
        sizes = {"window_size": tower.window_size, "patch_size": tower.patch_size}
        index, bounds["cu_window_seqlens"] = vision_utils.get_vision_window_index(grid, merge, **sizes)
        made["window_index"] = send(index, device)
    if hasattr(tower, "num_grid_per_side"):
        how = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        found = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, tower.num_grid_per_side, spatial_merge_size=merge, **how
        )
        made |= zip(("interp_indices", "interp_weights"), (send(part, device) for part in found), strict=True)
    longest = {name: int(ends.diff().max()) for name, ends in bounds.items()}
    return made | bounds | {f"max{name[2:-1]}": length for name, length in longest.items()}
