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
        self._decoder, self._cache = decoder, cache
        most = int(min(MOST_ROWS, cache.capacity, decoder.reach))
        self._embeds = table.new_zeros(1, most, table.shape[1])
        self._positions = torch.zeros(decoder.axes, 1, most, dtype=torch.long, device=table.device)
        self._numbers = torch.arange(most, device=table.device)
        self._end = torch.zeros(1, dtype=torch.long, device=table.device)  # where the row begins in the cache's memory
        self.recorder: Recorder[int, Tensor] = Recorder(self._run, [self._end], place)

    @property
    def sizes(self) -> Sequence[int]:
        """All buckets of rows, the largest first."""
        most = len(self._numbers)
        return sorted({self._bucket(rows) for rows in range(1, most + 1)}, reverse=True)

    def __call__(self, embeds: Tensor, positions: Tensor, row: int) -> Tensor | None:
        """Hidden states (1, n, H) of a prompt's first n rows, whose keys and values go to an empty row of the cache.

        embeds     (1, n, H)
        positions  (1, n), or M-RoPE's (3, 1, n)
        Returns None where that was not recorded.
        """
        rows = embeds.shape[1]
        if rows > len(self._numbers) or (size := self._bucket(rows)) not in self.recorder:
            return None
        self._embeds[:, :rows] = embeds
        self._embeds[:, rows:size] = 0  # an earlier prompt may have overflowed, and its NaN would be junk that spreads
        self._positions[..., :rows] = positions
        self._end.fill_(row * self._cache.capacity)
        return self.recorder.replay(size)[:, :rows].clone()

    def _bucket(self, rows: int) -> int:
        return column_bucket(rows, len(self._numbers), GRAIN)

    def _run(self, size: int) -> Tensor:
        """The same operations for every row of the cache: which one it is, only the device knows."""
        columns = self._end + self._numbers[:size]

        def attend(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
            return causal_attention(queries, keys.index_select(2, columns), values.index_select(2, columns), **options)

        positions = self._positions if self._decoder.axes > 1 else self._positions[0]
        with self._cache.anywhere(self._end, size):
            return self._decoder(self._embeds[:, :size], positions[..., :size], self._cache, attend)
