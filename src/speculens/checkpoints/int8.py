"""Weights of a drafter in 8 bits: half the size on disk, and the same drafts but for a few.

A matrix becomes whole numbers from -127 to 127 and one scale for each of its rows; all else stays. Whatever that costs
is acceptance alone, for the target chooses every token. In memory a drafter is of the target's dtype as ever.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALES = "scales"  # those of NAME are stored as NAME.scales


def pressed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix (n, m) of floating-point numbers as int8, and its scales (n, 1) in float32, where none becomes 0."""
    made: dict[str, Tensor] = {}
    for name, weight in state.items():
        if weight.ndim != 2 or not weight.is_floating_point():
            made[name] = weight
            continue
        least = 128 * torch.finfo(torch.float32).tiny
        scales = weight.float().abs().amax(1, keepdim=True).clamp(min=least) / 127
        made[f"{name}.{SCALES}"] = scales
        made[name] = (weight.float() / scales).round().to(torch.int8)
    return made


def restored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse in float32, up to half a step of each row; a state without scales as it is."""
    made = {}
    for name, weight in state.items():
        scales = state.get(f"{name}.{SCALES}")
        if scales is not None:
            made[name] = weight.float() * scales
        elif not name.endswith(f".{SCALES}"):
            made[name] = weight
    return made
