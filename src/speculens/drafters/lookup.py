"""Prompt lookup as a tree: copy what followed the last few tokens before. Training-free: the floor for trained ones.

Idea: prompt lookup decoding (Saxena, 2023); here every earlier occurrence adds a branch, longest match and newest
first, so that several continuations are checked in one pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speculens.drafters.base import DraftSession, Lender
from speculens.features import Features
from speculens.tree import DraftTree, TreeShape


class LookupDrafter:
    """Needs no weights. `longest` is the longest run of tokens that is matched."""

    name = "lookup"

    def __init__(self, longest: int = 3, shape: TreeShape | None = None) -> None:
        self.longest = longest
        self.shape = shape or TreeShape(num_steps=7, topk=4, num_draft_tokens=16)

    def session(self, target: Lender, slots: int, capacity: int, shape: TreeShape | None = None) -> DraftSession:
        return _LookupSession(self.longest, shape or self.shape)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "image_contract": "hidden",
            "longest_match": self.longest,
            "tree": vars(self.shape),
        }


class _History:
    """One slot's text tokens, with an index from every run of up to `longest` tokens to where it ended."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def append(self, token: int) -> None:
        # The run ending in the newest token is indexed when the next one comes: it has no continuation before.
        for size in range(1, min(self.longest, len(self.tokens)) + 1):
            self._ends[tuple(self.tokens[-size:])].append(len(self.tokens))
        self.tokens.append(token)

    def continuations(self) -> list[int]:
        """Where the text went on after earlier occurrences of its end: longest match first, then newest first."""
        found: dict[int, None] = {}
        for size in range(min(self.longest, len(self.tokens)), 0, -1):
            found.update(dict.fromkeys(reversed(self._ends.get(tuple(self.tokens[-size:]), []))))
        return list(found)


class _LookupSession:
    def __init__(self, longest: int, shape: TreeShape) -> None:
        self._longest, self._shape = longest, shape
        self.nodes = shape.num_draft_tokens
        self.state, self.nbytes = None, 0  # histories are the host's
        self._slots: list[_History] = []

    def begin(self, features: Features, first: Tensor) -> None:
        history = _History(self._longest)
        for token in [*features.tokens[~features.image].tolist(), int(first)]:
            history.append(token)
        self._slots.append(history)

    def draft(self, roots: Tensor, shape: TreeShape | None = None, horizon: int = 0) -> DraftTree:
        tries = [self._grow(history, shape or self._shape) for history in self._slots]
        size = max(len(tokens) for tokens, _, _ in tries)
        padded = [
            [values + [0] * (size - len(values)) for values in (*trie, [1] * len(trie[0]))] for trie in tries
        ]  # padding hangs under the root and is not live
        tokens, parents, depth, live = torch.tensor(padded, device=roots.device).unbind(1)
        tokens[:, 0] = roots
        return DraftTree.build(tokens, parents, depth, live.bool(), max(max(trie[2]) for trie in tries))

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor, horizon: int = 0) -> None: ...

    def settle(self, accepted: Sequence[Sequence[int]]) -> None:
        for history, tokens in zip(self._slots, accepted, strict=True):
            for token in tokens:
                history.append(token)

    def free(self, row: int) -> None:
        last = self._slots.pop()
        if row < len(self._slots):
            self._slots[row] = last

    def _grow(self, history: _History, shape: TreeShape) -> tuple[list[int], list[int], list[int]]:
        """Tokens, parents and depth of the trie of continuations; node 0 is the root."""
        tokens, parents, depth = [history.tokens[-1]], [0], [0]
        children: dict[tuple[int, int], int] = {}
        for start in history.continuations():
            node = 0
            for token in history.tokens[start : start + shape.levels]:
                if (node, token) not in children:
                    if len(tokens) == shape.num_draft_tokens:
                        return tokens, parents, depth
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depth.append(depth[node] + 1)
                node = children[node, token]
        return tokens, parents, depth
