"""The decoder's pass over a short prompt, recorded as CUDA graphs, one for each bucket of rows.

Launching it kernel by kernel keeps the host busy for longer than a few hundred rows keep the device. Longer prompts
hide the launches behind arithmetic, so they and all later pieces of a prompt are launched as ever.

Rows are padded up to the bucket. Padding comes last and attention is causal, so no real row sees any of it; its keys
and values are junk behind the committed columns, where junk may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speculens.attention import causal_attention
from speculens.cache import SlotCache
from speculens.capture import Place, Recorder, column_bucket
from speculens.targets.fused import FusedDecoder

MOST_ROWS, GRAIN = 512, 64


class PromptGraphs:
    """Passes over a prompt's first rows, for those sizes that were recorded.

    table  (V, H), the embeddings: rows of its kind are what the decoder takes
    place  of the graphs of the steps, which run in turn with these
    """

    def __init__(self, decoder: FusedDecoder, cache: SlotCache, table: Tensor, place: Place | None) -> None:
        self._rows = _FirstRows(decoder, cache, table)
        # The recorder holds the rows' work and not ours: a ring would keep the cache until Python collects its garbage.
        self.recorder: Recorder[int, Tensor] = Recorder(self._rows.run, [self._rows.end], place)

    @property
    def sizes(self) -> Sequence[int]:
        """All buckets of rows, the largest first."""
        return sorted({self.bucket(rows) for rows in range(1, self._rows.most + 1)}, reverse=True)

    def bucket(self, rows: int) -> int:
        """The size that so many rows are padded to."""
        return column_bucket(rows, self._rows.most, GRAIN)

    def __call__(self, embeds: Tensor, positions: Tensor, row: int) -> Tensor | None:
        """Hidden states (1, n, H) of a prompt's first n rows, whose keys and values go to an empty row of the cache.

        embeds     (1, n, H)
        positions  (1, n), or M-RoPE's (3, 1, n)
        Returns None where that was not recorded.
        """
        rows = embeds.shape[1]
        if rows > self._rows.most or (size := self.bucket(rows)) not in self.recorder:
            return None
        self._rows.fill(embeds, positions, row, size)
        return self.recorder.replay(size)[:, :rows].clone()


class _FirstRows:
    """The buffers of a pass, and the pass over them: the same operations for every row of the cache.

    most  rows that fit
    end   (1,) long, where the cache's row begins in its memory: only the device knows
    """

    def __init__(self, decoder: FusedDecoder, cache: SlotCache, table: Tensor) -> None:
        self._decoder, self._cache = decoder, cache
        self.most = int(min(MOST_ROWS, cache.capacity, decoder.reach))
        self.embeds = table.new_zeros(1, self.most, table.shape[1])
        self._positions = torch.zeros(decoder.axes, 1, self.most, dtype=torch.long, device=table.device)
        self._numbers = torch.arange(self.most, device=table.device)
        self.end = torch.zeros(1, dtype=torch.long, device=table.device)

    def fill(self, embeds: Tensor, positions: Tensor, row: int, size: int) -> None:
        """What the next run of so many rows takes."""
        rows = embeds.shape[1]
        self.embeds[:, :rows] = embeds
        self.embeds[:, rows:size] = 0  # an earlier prompt may have overflowed, and its NaN would be junk that spreads
        self._positions[..., :rows] = positions
        self.end.fill_(row * self._cache.capacity)

    def run(self, size: int) -> Tensor:
        """Hidden states (1, size, H)."""
        columns = self.end + self._numbers[:size]

        def attend(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
            return causal_attention(queries, keys.index_select(2, columns), values.index_select(2, columns), **options)

        positions = self._positions if self._decoder.axes > 1 else self._positions[0]
        with self._cache.anywhere(self.end, size):
            return self._decoder(self.embeds[:, :size], positions[..., :size], self._cache, attend)
