"""Stand-ins for CUDA graphs where there is no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from speculens.capture import Recorder


class Again(Recorder):
    """Graphs of anything: a replay runs the work again and writes over what the last one gave."""

    def __init__(self, work: Any, state: Any, place: Any = None) -> None:
        super().__init__(work, state, place)
        self.on = True

    def _record(self, key, kept):
        return None, self._work(key)

    def replay(self, key):
        self.replays += 1
        result = self._graphs[key][1]
        for held, made in zip(tree_leaves(result), tree_leaves(self.again(key)), strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(made)
        return result

    def again(self, key):
        """Run the work."""
        return self._work(key)
