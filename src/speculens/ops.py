"""What decoder layers are made of, beside attention: each operation in plain torch, and on a GPU as one kernel.

The torch definition is the meaning, and what runs on a CPU; `kernels.py` computes the same up to rounding, with fewer
launches. Both follow the arithmetic of Hugging Face's Llama: norms in float32, cast before their gain.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculens.cache import SlotCache
from speculens.errors import first_line
from speculens.int8 import Int8Linear, widened

log = logging.getLogger(__name__)

Gains = tuple[Tensor, Tensor, float]
"""Gains of the norms on queries and keys, (d,) each, and their epsilon."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """What the host made, on a device. The host goes on at once: only page-locked memory is read while it does."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.contiguous().pin_memory()  # what is expanded cannot be
    return tensor.to(device, non_blocking=True)


class Joined:
    """Linear layers on the same input as one product: `join([q, k, v])(x)` is their outputs side by side.

    The layers' parameters become views of one tensor, so nothing is stored twice and the layers work as before.
    Whoever gives a parameter other storage afterwards (a cast, a move to another device) ends that: see `intact`.
    Layers that cannot be joined (adapted ones, or quantised by others) run one after another.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers: tuple[Any, ...] = tuple(layers)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.scales: Tensor | None = None
        if self.possible(layers):
            self.weight = _one_tensor([layer.weight for layer in self._layers])
            biases = [layer.bias for layer in self._layers if layer.bias is not None]
            self.bias = _one_tensor(biases) if biases else None
            if type(layers[0]) is Int8Linear:
                self.scales = torch.cat([layer.scales for layer in self._layers])

    @staticmethod
    def possible(layers: Sequence[Any]) -> bool:
        """Whether these are plain linear layers alike in input, dtype, device and in having a bias."""
        if not all(type(layer) in (nn.Linear, Int8Linear) for layer in layers):  # a subclass may do something else
            return False
        kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in layers}
        return len(kinds) == 1

    @property
    def intact(self) -> bool:
        """Whether the layers' weights still lie in the joined one, if there is one."""
        if self.weight is None:
            return True
        place = self.weight.data_ptr()
        for layer in self._layers:
            if layer.weight.data_ptr() != place or layer.weight.dtype != self.weight.dtype:
                return False
            place += layer.weight.nbytes
        return True

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return torch.cat([layer(x) for layer in self._layers], -1)
        return linear(x, self.weight, self.bias, self.scales)


@torch.no_grad()
def _one_tensor(parts: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole


STREAMED_ROWS = 32
"""Up to how many rows (at most 64) `linear` takes our kernels.

On an H200, cuBLAS took 1.02 to 1.35 times as long as ours for one row, 0.97 to 1.20 times for 10 to 32, and less than
ours for 60 (`benchmarks/target_pass.py`, and the same with `--products`).
"""


STREAMED_INT8_ROWS = 256
"""The same for int8, whose other way is to make the whole matrix anew: so many rows at most, 64 at a time."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """Inputs x (..., K) times weight (O, K), plus bias (O,): (..., O).

    scales  (O, 1), where the weight is int8: what each of its rows is times
    """
    rows = x.numel() // x.shape[-1]
    most = STREAMED_ROWS if scales is None else STREAMED_INT8_ROWS
    streamed = 1 <= rows <= most and x.dtype.itemsize == 2 and not torch.is_grad_enabled()
    if streamed and (kernels := kernels_for(x)):
        if rows == 1 and scales is None:
            return kernels.linear_row(x, weight, bias)
        return kernels.linear_rows(x, weight, bias, scales)
    return F.linear(x, weight if scales is None else widened(weight, scales, x.dtype), bias)


def project(layer: Any, x: Tensor) -> Tensor:
    """A linear layer's output: `linear` with its weights, unless it is a subclass or something listens to it."""
    if type(layer) not in (nn.Linear, Int8Linear) or is_watched(layer):
        return layer(x)
    return linear(x, layer.weight, layer.bias, getattr(layer, "scales", None))


def look_up(table: Any, tokens: Tensor) -> Tensor:
    """Rows of an embedding: tokens (...) -> (..., H).

    For a few tokens on a GPU, gathering whole rows is faster than torch's embedding (2 against 6 us on an H200).
    """
    if not tokens.is_cuda or type(table) is not nn.Embedding or is_watched(table) or torch.is_grad_enabled():
        found: Tensor = table(tokens)
        return found
    weight = table.weight
    return weight.gather(0, tokens.reshape(-1, 1).expand(-1, weight.shape[1])).view(*tokens.shape, -1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Of x (B, n, W) the rows index (B, m) -> (B, m, W)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked a module's forward, or put another in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))  # noqa: SLF001


def add_norm(stream: Tensor, update: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream (B, N, H) with `update` added, and its RMSNorm times gain (H,)."""
    if kernels := kernels_for(stream):
        return kernels.add_norm(stream, update, gain, eps)
    added = stream if update is None else stream + update
    return added, _norm(added, gain, eps)


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate and up side by side (..., 2 I) -> silu(gate) * up (..., I)."""
    if kernels := kernels_for(gate_up):
        return kernels.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate_into(
    cache: SlotCache, layer: int, joined: Tensor, cos: Tensor, sin: Tensor, gains: Gains | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys, and write keys and values where the cache was last aimed.

    joined    (B, N, (heads + 2 kv_heads) d), all that attention projects; it may be overwritten
    cos, sin  (B, N, d) or (1, N, d), of the pairs (i, i + d / 2)
    gains     of an RMSNorm on each query and key before they turn
    Returns queries (B, heads, N, d) and views of all keys and values (B, kv_heads, columns, d).
    """
    if kernels := kernels_for(joined):
        keys, values = cache.views(layer)
        return kernels.rotate_into(joined, cos, sin, keys, values, cache.aimed, cache.start, gains), keys, values
    states = joined.unflatten(2, (-1, cache.head_dim)).transpose(1, 2)
    queries, keys, values = states.split([states.shape[1] - 2 * cache.heads, cache.heads, cache.heads], 1)
    if gains is not None:
        queries, keys = _norm(queries, gains[0], gains[2]), _norm(keys, gains[1], gains[2])
    cos, sin = cos[:, None], sin[:, None]
    return rotate(queries, cos, sin), *cache.write(layer, rotate(keys, cos, sin), values)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of x (B, heads, N, d), as Llama and Qwen do."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def kernels_for(x: Tensor, file: str = "speculens.kernels") -> ModuleType | None:
    """The kernels of a file, where they run on x: on a GPU with Triton, but not for float64, which models have not."""
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    return _kernels(x.device, file)


@cache
def _kernels(device: torch.device, file: str) -> ModuleType | None:
    try:
        kernels = importlib.import_module(file)
        kernels.try_out(device)  # compilers and drivers fail here or not at all
    except Exception as error:  # noqa: BLE001 - whatever it is, plain torch does the same
        log.warning("No Triton kernels of %s on %s, plain torch instead: %s", file, device, first_line(error))
        return None
    return kernels
