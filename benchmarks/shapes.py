"""Decoders whose cost is measured: the sizes of the 7B models that people run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Of a text decoder. `bias` is that of queries, keys and values."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    bias: bool = False


# Qwen2.5-VL-7B and LLaVA-1.5-7B, by family.
SEVEN_B = {
    "qwen2_5_vl": Shape(layers=28, hidden=3584, heads=28, kv_heads=4, mlp=18944, vocabulary=152_064, bias=True),
    "llava": Shape(layers=32, hidden=4096, heads=32, kv_heads=32, mlp=11008, vocabulary=32_064),
}
