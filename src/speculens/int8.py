"""Weights of a drafter in 8 bits: half the bytes to store and to read at each step, and the same drafts but for a few.

A matrix becomes whole numbers from -127 to 127 and one scale for each of its rows; all else stays. Whatever that costs
is acceptance alone, for the target chooses every token. On disk that is any drafter's choice; in memory it pays where a
step is bound by reading weights and our kernels read them: on a GPU, in half precision (`Int8Linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = "scales"  # those of NAME are stored as NAME.scales
AT_ONCE = 1 << 22  # numbers that are pressed at the same time, for on their way they take eight bytes each


def pressed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix (n, m) of floating-point numbers as int8, and its scales (n, 1) in float32, where none becomes 0."""
    made: dict[str, Tensor] = {}
    for name, weight in state.items():
        if weight.ndim == 2 and weight.is_floating_point():
            made[name], made[f"{name}.{SCALES}"] = press(weight)
        else:
            made[name] = weight
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


def press(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (n, m) as int8, and its scales (n, 1) in float32."""
    pieces = [_press(piece) for piece in weight.split(max(1, AT_ONCE // weight.shape[1]))]
    return torch.cat([numbers for numbers, _ in pieces]), torch.cat([scales for _, scales in pieces])


def _press(weight: Tensor) -> tuple[Tensor, Tensor]:
    least = 128 * torch.finfo(torch.float32).tiny
    scales = weight.abs().amax(1, keepdim=True).float().clamp(min=least) / 127
    return (weight / scales).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer whose matrix is held in 8 bits. It does not learn; as a state it is the matrix that it stands for.

    weight  (O, K) int8
    scales  (O, 1) float32, whatever the drafter is cast to
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, scales = press(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """By a matrix of x's dtype that is made for the occasion; `ops.linear` does without for a few rows."""
        return F.linear(x, widened(self.weight, self.scales, x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = widened(self.weight, destination.pop(f"{prefix}scales"), torch.float32)


def widened(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (O, K) that int8 and its scales stand for, in a dtype."""
    return weight.to(dtype).mul_(scales)


def press_linears(modules: Iterable[nn.Module]) -> None:
    """Hold the matrices of these modules' own linear layers in 8 bits from now on."""
    for module in list(modules):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, Int8Linear(layer))
