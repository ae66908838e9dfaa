"""What a drafter checkpoint says about itself: the `config.json` of our own layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speculens.errors import UserError
from speculens.tree import TreeShape
from speculens.values import one_of, read

NAME = "The drafter's config.json"  # what messages call it
CONTRACTS = ("full", "compress", "adaptor", "hidden")
FORMER = ("num_query_tokens",)  # keys of older files, that meant nothing
SIZES = (
    *("target_hidden_size", "target_vocab_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a drafter and of the target that it was made for.

    speculator_type      the method: `eaglevlm`, ...
    image_contract       what it sees of a picture: full | compress | adaptor | hidden
    target_*             of the target whose embedding and head it borrows
    input_norm           RMSNorm before the layer's attention. Off in EAGLE; on for EagleVLM's stability (SpecVLM, 3.1)
    min_pixels           least pixels of the pictures that it learnt from, and `max_pixels` the most, where the target's
                         processor scales them to an area
    draft_vocab_size     V', how many of the target's tokens it drafts: those of its tensor `d2t`; None drafts all
    tree                 the tree it was tuned for; engine options override it
    options              what only this method knows
    """

    speculator_type: str
    target_hidden_size: int
    target_vocab_size: int
    target_family: str
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    image_contract: str = "full"
    num_hidden_layers: int = 1
    draft_vocab_size: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    input_norm: bool = True
    tree: TreeShape = field(default_factory=TreeShape)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of(f"{NAME}: image_contract", self.image_contract, CONTRACTS)
        for name in SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"{NAME}: {name} must be above 0, not {getattr(self, name)}.")
        if self.num_hidden_layers != 1:
            raise UserError(f"{NAME}: num_hidden_layers must be 1, not {self.num_hidden_layers}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DrafterConfig:
        """Inverse of `to_dict`, also of older ones; raises UserError on missing or unknown keys and on wrong types."""
        return read(DrafterConfig, {key: value for key, value in values.items() if key not in FORMER}, NAME)
