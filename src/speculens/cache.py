"""Preallocated keys and values for every slot: append, keep the accepted path in place, free.

This is the only file that knows transformers' `Cache`. One block of memory is allocated when the cache is made, so the
bytes are known before the first request; nothing grows later.

Running slots always fill rows 0 .. running-1, so a step works on views and never gathers K/V. `free(row)` therefore
moves the last running slot into the freed row; whoever keeps state per row must do the same.

Calls that write: `aim` says where the next write goes, `write` writes, `keep` or `commit` commits, `free` forgets.
Columns at or beyond a slot's length hold junk at all times; whoever reads must mask them.

Lengths live on the device. A step never asks for them: the host follows with `settle` once it has read what was
accepted, and only the number of columns that a step looks at depends on what the host knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

CACHE_NAMES = NEW_NAME, OLD_NAME = "cache", "past_key_values"  # in a forward: since transformers 5.24, and before


def cache_arguments(module: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """How a Hugging Face model or decoder is given a cache, or none: by the name that its own forward has for it."""
    return {_cache_name(type(module).forward): cache, "use_cache": cache is not None}


@lru_cache(64)
def _cache_name(forward: Callable[..., Any]) -> str:
    return NEW_NAME if NEW_NAME in inspect.signature(forward).parameters else OLD_NAME


class SlotCache:
    """Keys and values of `layers` attention layers for up to `slots` sequences of up to `capacity` columns.

    lengths  (slots,) long on the device: committed columns of each row
    extents  the host's knowledge of the same: exact after `settle`; decides how many columns a step looks at
    """

    GRAIN = 64  # columns: where a step looks at a bucket of them, masks of this width need no padding

    def __init__(
        self,
        *,
        slots: int,
        capacity: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        devices: Sequence[torch.device],
    ) -> None:
        self.slots, self.capacity, self.heads, self.head_dim = slots, capacity, heads, head_dim
        self.running = 0
        self._filling = False
        self.extents = [0] * slots
        self.lengths = torch.zeros(slots, dtype=torch.long, device=devices[0])
        self._offsets = torch.arange(capacity, device=devices[0])
        self._starts = torch.arange(slots, device=devices[0]) * capacity
        # One block per device holds the keys and values of all its layers: keep() is then two kernels, not 4 per layer.
        self._blocks: dict[torch.device, Tensor] = {}
        self._place: list[tuple[torch.device, int]] = []
        for device in devices:
            self._place.append((device, 2 * sum(d == device for d, _ in self._place)))
        for device in set(devices):
            count = 2 * sum(d == device for d in devices)
            self._blocks[device] = torch.zeros(count, slots * capacity, heads * head_dim, dtype=dtype, device=device)
        self._rows = range(0)
        self.start = 0  # where the next write begins, counted from each row's length
        self._columns = self._width = 0
        self._high = 0  # columns ever written to
        self._index: Tensor | None = None  # of what is written next, made when it is needed
        self._end: Tensor | None = None  # where that begins, if only the device knows

    @property
    def nbytes(self) -> int:
        """Bytes held for keys and values, all of them from the start."""
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def longest(self) -> int:
        """Committed columns of the longest running row."""
        return max(self.extents[: self.running], default=0)

    @property
    def columns(self) -> int:
        """How many columns the next reads return: the longest aimed row, with what is written on top."""
        return self._columns

    @property
    def aimed(self) -> Tensor:
        """Committed columns of the aimed rows: a view of `lengths`."""
        if self._end is not None:
            return self._end
        return self.lengths[self._rows.start : self._rows.stop]

    @property
    def before(self) -> int:
        """How many of these lie below what is written next, at most."""
        return self._columns - self._width

    def admit(self) -> int:
        """Open the next row, empty, and return its number."""
        row = self._open()
        self.running += 1
        return row

    @contextmanager
    def opening(self) -> Iterator[int]:
        """A block that fills the row behind the running ones; then it runs, too. If that fails, nothing has happened.

        Steps and `free` may come meanwhile. So the row's number is `running` at any time, and what is filled must be
        committed, because steps that are padded write junk behind it.
        """
        row = self._open()
        self._filling = True
        try:
            yield row
        except BaseException:
            self._wipe(self.running)
            raise
        else:
            self.running += 1
        finally:
            self._filling = False

    def aim(self, rows: range, width: int, start: int = 0, horizon: int = 0) -> None:
        """Let the next writes go to columns `length + start` .. `+ width` of these rows; reads see all before.

        horizon  0 looks at as many columns as the longest of the rows has. Else a bound of their lengths, and the
                 columns follow from it alone: what one graph is recorded for
        """
        self._rows, self._width, self.start = rows, width, start
        self._columns = (horizon or max((self.extents[row] for row in rows), default=0)) + start + width
        if horizon:
            self._columns = min(-(-self._columns // self.GRAIN) * self.GRAIN, self.capacity)
        if self._columns > self.capacity:
            raise RuntimeError(f"KV cache overflow: {self._columns} columns asked, {self.capacity} held")
        self._high = max(self._high, self._columns)
        self._index = None

    @contextmanager
    def anywhere(self, end: Tensor, width: int) -> Iterator[None]:
        """A block whose writes go to `width` columns from place `end` (1,) of all rows laid end to end.

        The device alone knows the place, so one graph serves every row. Reads see all rows as one, and it is the
        reader's affair which of their columns are his. Then the aim is what it was.
        """
        before = self._rows, self.start, self._columns, self._width, self._index
        self._rows, self.start, self._columns, self._width = range(1), 0, width, width
        self._high = max(self._high, width)
        self._end, self._index = end, end + self._offsets[:width]
        try:
            yield
        finally:
            self._rows, self.start, self._columns, self._width, self._index = before
            self._end = None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, heads, n, head_dim) keys and values of the aimed rows; views (B, heads, columns, dim) return."""
        self._put(layer, 0, keys)
        self._put(layer, 1, values)
        return self.views(layer)

    def views(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the aimed rows, (B, heads, columns, head_dim) each: the cache's own memory."""
        return self._view(layer, 0), self._view(layer, 1)

    def keep(self, path: Tensor, counts: Tensor) -> None:
        """Commit the accepted path of every running slot, in place.

        path    (B, P) offsets of the kept columns from each slot's length, in order; the first `counts` are committed
        counts  (B,) how many
        """
        batch, width = path.shape
        ends = self._ends(range(batch))[:, None]
        source, target = (ends + path).flatten(), (ends + self._offsets[:width]).flatten()
        for device, block in self._blocks.items():
            # The right-hand side is gathered before anything is written, so overlapping moves are safe.
            block.index_copy_(1, target.to(device), block.index_select(1, source.to(device)))
        self.lengths[:batch].add_(counts)

    def commit(self, counts: Tensor | int) -> None:
        """Commit the first `counts` (B,) of the columns just written to the aimed rows."""
        self.aimed.add_(counts)

    def settle(self, counts: Sequence[int], first: int = 0) -> None:
        """Tell the host's side how many columns were committed, to the rows from `first` on."""
        for row, count in enumerate(counts, first):
            self.extents[row] += count

    def free(self, row: int) -> None:
        """Forget a row; the last running slot takes its place."""
        last = self.running - 1
        self._move(last, row)
        if self._filling:
            self._move(self.running, last)
        self._wipe(last + self._filling)
        self.running = last

    def _ends(self, rows: range) -> Tensor:
        """Where the next column of each row stands in a block."""
        return self._starts[rows.start : rows.stop] + self.lengths[rows.start : rows.stop]

    def _open(self) -> int:
        if self.running + self._filling == self.slots:
            raise RuntimeError(f"all {self.slots} slots are running")
        self.lengths[self.running].zero_()
        self.extents[self.running] = 0
        return self.running

    def _move(self, source: int, target: int) -> None:
        if source != target:
            for slots in self._by_row():
                slots[:, target] = slots[:, source]
            self.lengths[target] = self.lengths[source]
            self.extents[target] = self.extents[source]

    def _wipe(self, row: int) -> None:
        """Masked columns have weight 0, but 0 times the NaN of an overflowed request is NaN: nothing of it may stay."""
        for slots in self._by_row():
            slots[:, row].zero_()  # assigning a number would wait for the device, here and below
        self.lengths[row].zero_()
        self.extents[row] = 0

    def _by_row(self) -> Iterator[Tensor]:
        """Views (layers and kinds, slots, columns ever written to, heads x dim) of all that is held."""
        for block in self._blocks.values():
            yield block.view(len(block), self.slots, self.capacity, -1)[:, :, : self._high]

    def as_transformers(self) -> Cache:
        """This cache as the object that a Hugging Face decoder takes; `cache_arguments` says under which name."""
        return Cache(layers=[_Layer(self, layer) for layer in range(len(self._place))])

    def _put(self, layer: int, which: int, states: Tensor) -> None:
        if states.shape[1] != self.heads or states.shape[3] != self.head_dim:
            raise RuntimeError(
                f"layer {layer} has {states.shape[1]} KV heads of {states.shape[3]}, "
                f"the cache {self.heads} of {self.head_dim}"
            )
        if self._index is None:
            index = self._ends(self._rows)[:, None] + self._offsets[self.start : self.start + self._width]
            self._index = index.flatten()
        device, first = self._place[layer]
        flat = self._blocks[device][first + which]
        flat.index_copy_(0, self._index.to(device), states.transpose(1, 2).reshape(-1, flat.shape[1]))

    def _view(self, layer: int, which: int) -> Tensor:
        device, first = self._place[layer]
        flat = self._blocks[device][first + which]
        if self._end is not None:
            return flat.view(1, -1, self.heads, self.head_dim).transpose(1, 2)
        slots = flat.view(self.slots, self.capacity, self.heads, self.head_dim)
        return slots[self._rows.start : self._rows.stop, : self._columns].transpose(1, 2)


class _Layer(CacheLayerMixin):
    """One layer of a SlotCache in the form transformers calls. Sliding windows are the mask's affair, not ours."""

    is_sliding = False

    def __init__(self, cache: SlotCache, layer: int) -> None:  # nothing of the mixin's: no tensors, nothing to set up
        self._cache, self._layer = cache, layer

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]  # a variable in the mixin
        # Models ask this to tell a prompt's beginning (PaliGemma: what sees itself both ways) from what follows.
        return self._cache.before > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Everything is allocated already."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self._cache.write(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._cache.before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.columns, 0

    def get_max_length(self) -> int:
        return self._cache.capacity
