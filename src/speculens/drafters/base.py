"""What a drafter is to the engine: something that begins, drafts, observes and frees.

A drafter can never change the output: the target chooses every token, and a tree is only a guess at what it will
choose. It must be deterministic given what it has been shown, and nothing else is asked of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from speculens.errors import UserError
from speculens.features import Features
from speculens.int8 import Int8Linear
from speculens.tree import DraftTree, TreeShape


class Lender(Protocol):
    """What a drafter borrows from the target: its frozen embedding and head (targets.base.Target has these)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def family(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def head(self) -> nn.Module: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def logits(self, hidden: Tensor, head: nn.Linear | Int8Linear | None = None) -> Tensor: ...
    def head_rows(self, tokens: Tensor) -> nn.Linear: ...


@dataclass(frozen=True)
class Prefilled:
    """What a drafter made of a prompt.

    rows   how many it keeps of the prompt
    notes  what is worth noting of this prompt, lists by name
    """

    rows: int
    notes: Mapping[str, Any] = field(default_factory=dict)


class DraftSession(Protocol):
    """A drafter's state for a set of slots. Rows are numbered as in the target's cache: free moves the last one in.

    nodes  the largest tree it will ever draft, the root included
    state  all tensors on the device, caches of keys and values apart, that carry something from one step to the next;
           then `draft` and `observe` must be tensor operations of fixed shapes without a host read. None: some of the
           work is done on the host, so that steps cannot be captured
    nbytes bytes of keys and values, held from the start
    """

    @property
    def nodes(self) -> int: ...
    @property
    def state(self) -> Sequence[Tensor] | None: ...
    @property
    def nbytes(self) -> int: ...

    def begin(self, features: Features, first: Tensor) -> Prefilled | None:
        """Admit a slot: the target's features of its prompt (batch of one) and the first token chosen, (1,).

        Returns what it made of the prompt, for the slot's statistics; None if it keeps no row.
        """

    def draft(self, roots: Tensor, shape: TreeShape | None = None, horizon: int = 0) -> DraftTree:
        """Guess: a tree on each row's newest token, roots (B,).

        shape    of the tree, no larger than the session's own, which None means
        horizon  a bound of the target's rows for every slot of this step; 0 leaves it to what the session knows

        Rows behind the running ones may be among the B, where steps are captured: what is drafted there is never seen.
        """

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor, horizon: int = 0) -> None:
        """See what was accepted, on the device.

        hidden  (B, A, H) the target's features along each accepted path
        tokens  (B, A) long, the target's choice at each of them (the last is the next root)
        counts  (B,) long, how many of the A are real; 0 in rows that do not run, of which nothing may change
        horizon as in `draft`
        """

    def settle(self, accepted: Sequence[Sequence[int]]) -> None:
        """See the same on the host, once it knows: the tokens that each running slot accepted."""

    def free(self, row: int) -> None:
        """Forget a slot; the last running one takes its row."""


class Drafter(Protocol):
    """Makes sessions. `name` is what tables call it."""

    name: str

    def session(self, target: Lender, slots: int, capacity: int, shape: TreeShape | None = None) -> DraftSession:
        """Room for `slots` sequences of up to `capacity` rows; `shape` overrides the drafter's own tree."""

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows."""


def reshaped(drafter: Drafter, changes: Mapping[str, int]) -> TreeShape | None:
    """The drafter's own tree with some of its numbers changed; None if none are. Raises UserError if it has no tree."""
    if not changes:
        return None
    own = drafter.describe()["tree"]
    if "num_steps" not in own:
        raise UserError(
            f"The drafter {drafter.name} grows no tree: leave out --{next(iter(changes)).replace('_', '-')}."
        )
    return TreeShape(**{**own, **changes})


class NoDrafter:
    """Drafts nothing: a tree of one node. The autoregressive baseline is the same loop with the same kernels."""

    name = "none"

    def session(self, target: Lender, slots: int, capacity: int, shape: TreeShape | None = None) -> DraftSession:
        return _NoSession()

    def describe(self) -> dict[str, Any]:
        return {"drafter": self.name, "image_contract": "hidden", "tree": {"num_draft_tokens": 1}}


class _NoSession:
    nodes = 1
    nbytes = 0
    state: Sequence[Tensor] = ()

    def begin(self, features: Features, first: Tensor) -> None: ...

    def draft(self, roots: Tensor, shape: TreeShape | None = None, horizon: int = 0) -> DraftTree:
        return DraftTree.root(roots)

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor, horizon: int = 0) -> None: ...

    def settle(self, accepted: Sequence[Sequence[int]]) -> None: ...

    def free(self, row: int) -> None: ...
