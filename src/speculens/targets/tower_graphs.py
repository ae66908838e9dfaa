"""A vision tower's pass over pictures whose sizes come again, recorded as CUDA graphs.

A tower launches some twenty kernels a layer through transformers' modules, and the device waits for most of them: for
small pictures the launches take longer than the work. Which sizes will come nobody knows beforehand, so a graph is
recorded when the same sizes are seen for the second time. Only what the tensors hold may differ between passes of one
graph: their shapes, and all that is on the host, such as the pictures' sizes, make its key. So a replay is the same
kernels on the same shapes, and its results are bit by bit those of the launched pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from speculens.capture import Recorder

MOST_SIZES = 16  # of which graphs are held; those least in use go first
MOST_BYTES = 1 << 24  # of a pass's inputs: in larger ones launches hide behind the work, and a graph holds its memory


class TowerGraphs:
    """Passes of one tower. Used by those forwards of the model that run within `in_place`."""

    def __init__(self, tower: nn.Module, device: torch.device) -> None:
        self._tower = tower
        self._held: OrderedDict[Hashable, tuple[list[Any], Any]] = OrderedDict()  # inputs of each graph: leaves, tree
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        # A tower carries nothing from pass to pass, so what is put back after recording is a stand-in.
        self.recorder: Recorder[Hashable, Any] = Recorder(self._run, [torch.zeros(1, device=device)])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A block in which calls of the tower are replayed where they can be."""
        own = vars(self._tower).get("forward")  # set by accelerate, for one
        self._forward = self._tower.forward
        self._tower.forward = self._replayed
        try:
            yield
        finally:
            if own is None:
                del self._tower.forward
            else:
                self._tower.forward = own

    def _replayed(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        key = None if torch.is_grad_enabled() else _key(leaves, tree)
        if key is None or not self._ready(key, leaves, tree):
            return self._forward(*args, **kwargs)
        held, _ = self._held[key]
        for buffer, leaf in zip(held, leaves, strict=True):
            if _on_device(leaf):
                buffer.copy_(leaf)
        # The next replay writes over its results, and a prompt may hold several pictures of one size.
        return pytree.tree_map_only(Tensor, Tensor.clone, self.recorder.replay(key))

    def _ready(self, key: Hashable, leaves: Sequence[Any], tree: Any) -> bool:
        """Whether there is a graph of this key; at its second sight one is recorded."""
        if key in self._held:
            self._held.move_to_end(key)
            return True
        if not self.recorder.on:
            return False
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > 4 * MOST_SIZES:
                self._seen.popitem(last=False)
            return False
        self._held[key] = [leaf.clone() if _on_device(leaf) else leaf for leaf in leaves], tree
        if len(self._held) > MOST_SIZES:
            self.recorder.forget(self._held.popitem(last=False)[0])
        if not self.recorder.ready(key):
            self._held.clear()
        return self.recorder.on

    def _run(self, key: Hashable) -> Any:
        args, kwargs = pytree.tree_unflatten(*self._held[key])
        return self._forward(*args, **kwargs)


def towers_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The parts of a model that are models themselves, its text decoder apart."""
    decoder = model.get_decoder()
    return [part for part in model.base_model.children() if isinstance(part, PreTrainedModel) and part is not decoder]


def _on_device(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


class _Key(tuple[Hashable, ...]):
    """What decides which kernels run."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "a pass of the vision tower"


def _key(leaves: Sequence[Any], tree: Any) -> _Key | None:
    """None where that cannot be told, or the pass is too large."""
    parts: list[Hashable] = [tree]
    size = 0
    for leaf in leaves:
        if _on_device(leaf):
            size += leaf.nbytes
            parts.append((leaf.shape, leaf.dtype))
        elif isinstance(leaf, Tensor):
            parts.append((leaf.shape, leaf.dtype, *leaf.flatten().tolist()))
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype)):
            parts.append((type(leaf), leaf))
        else:
            return None
    return _Key(parts) if size <= MOST_BYTES else None
