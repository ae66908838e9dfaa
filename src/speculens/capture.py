"""Work on fixed buffers, recorded once as a CUDA graph for each bucket and replayed from then on.

Launching a step's thousands of small kernels one by one takes longer than running them. A graph launches them all at
once, but only the same work on the same buffers: so lengths and positions live on the device, and what the host decides
(how many rows, how large a tree, how many columns) comes in buckets, a graph for each.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

WARM_UPS = 2  # runs before a recording: libraries choose their kernels and take their workspaces


class Place(NamedTuple):
    """Memory of graphs that run in turn, and the one stream of their recording: libraries keep workspaces for each."""

    pool: Any
    stream: torch.cuda.Stream


class Recorder(Generic[Key, Result]):
    """Graphs of `work`, by key.

    work   of one key: the same tensor operations on the same buffers each time, without a host read
    state  the buffers that carry something from one run to the next. Recording runs the work, so they are put back;
           what else it writes must be junk that the next run writes anew
    place  where graphs lie that run one after another with these, another recorder's; None makes a new one

    captures, replays, and whether it is `on`: off from the start where there is no state to put back or no CUDA device,
    and for good after the first recording that fails.
    """

    def __init__(
        self,
        work: Callable[[Key], Result],
        state: Sequence[Tensor] | None,
        place: Place | None = None,
    ) -> None:
        self._work, self._state = work, state or ()
        self.on = bool(state) and all(part.is_cuda for part in self._state)
        self.captures = self.replays = 0
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Result]] = {}
        self.place = place
        if self.on and place is None:
            self.place = Place(torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._state[0].device))

    def __contains__(self, key: object) -> bool:
        return key in self._graphs

    def ready(self, key: Key) -> bool:
        """Whether `replay` can run this key; it is recorded now if that was not done before."""
        if self.on and key not in self._graphs:
            kept = [part.clone() for part in self._state]
            try:
                self._graphs[key] = self._record(key, kept)
                self.captures += 1
            except Exception as error:  # noqa: BLE001 - whatever stops a recording, the same work still runs eagerly
                self.on = False
                self._graphs.clear()
                reason = str(error).strip().split("\n")[0]
                logger.warning(
                    "Such work runs one kernel at a time from now on: %s could not be recorded (%s).", key, reason
                )
            finally:
                self._restore(kept)
        return self.on

    def forget(self, key: Key) -> None:
        """Drop the graph of this key, if there is one; later ones may take its memory."""
        self._graphs.pop(key, None)

    def replay(self, key: Key) -> Result:
        """Run the work of this key: what it returned when it was recorded now holds the new results."""
        graph, result = self._graphs[key]
        graph.replay()
        self.replays += 1
        return result

    def _record(self, key: Key, kept: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Result]:
        assert self.place  # noqa: S101 - for the type checker: nothing is recorded while this is off
        side, main = self.place.stream, torch.cuda.current_stream(kept[0].device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._work(key)
                self._restore(kept)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (a server's, a tokenizer's) may go on calling CUDA meanwhile.
            with (
                _uncollected(),
                torch.cuda.graph(graph, pool=self.place.pool, stream=side, capture_error_mode="thread_local"),
            ):
                result = self._work(key)
        finally:
            torch.cuda.set_stream(main)  # a recording that fails does not come back by itself
        return graph, result

    def _restore(self, kept: Sequence[Tensor]) -> None:
        for part, value in zip(self._state, kept, strict=True):
            part.copy_(value)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A block without collection of garbage: a graph that ends within another one's recording would spoil that."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def row_bucket(rows: int, most: int) -> int:
    """The next power of two, at most `most`: 32 slots need 6 graphs, not 32."""
    return min(1 << (rows - 1).bit_length(), most)


def column_bucket(columns: int, most: int, grain: int = 256, sizes: int = 4) -> int:
    """`columns` rounded up to one of `sizes` (a power of 2) an octave, and to `grain` at least; at most `most`."""
    step = max(grain, 1 << max((columns - 1).bit_length() - sizes.bit_length(), 0))
    return min(-(-columns // step) * step, most)
