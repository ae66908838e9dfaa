"""The one decoder layer that every trained drafter has: attention with 1-D RoPE, SwiGLU, RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculens.attention import folded_attention
from speculens.drafters.config import DrafterConfig
from speculens.ops import Joined, rotate, swiglu

# attend(queries (B, heads, m, d), keys and values (B, kv_heads, m, d)) -> (B, heads, m, d).
# The caller decides where keys and values live and who sees whom: training, prefill and tree growth differ only here.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class DecoderLayer(nn.Module):
    """One layer of the target's kind. Parameter names are those of the published EAGLE checkpoints."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        size, eps = config.target_hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps) if config.input_norm else nn.Identity()
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = _SwiGLU(size, config.intermediate_size)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Rows x (B, m, H) at positions (B, m) -> (B, m, H). No final norm (the output is a target feature)."""
        x = x + self.self_attn(self.input_layernorm(x), positions, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def join(self) -> None:
        """For decoding: queries, keys and values as one product, gate and up as another. Changes no value or name."""
        self.self_attn.joined = _joined(self.self_attn.projections, self.self_attn.joined)
        self.mlp.joined = _joined(self.mlp.gates, self.mlp.joined)


class _Attention(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        size, bias = config.target_hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)
        self.joined: Joined | None = None

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        cos, sin = _rope(positions, self.head_dim, self.theta, x.dtype)
        if _usable(self.joined):
            states = self.joined(x).split([project.out_features for project in self.projections], -1)
        else:
            states = tuple(project(x) for project in self.projections)
        queries, keys, values = map(self._heads, states)
        mixed = attend(rotate(queries, cos, sin), rotate(keys, cos, sin), values)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class _SwiGLU(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.joined: Joined | None = None

    @property
    def gates(self) -> tuple[nn.Linear, ...]:
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        if _usable(self.joined):
            return self.down_proj(swiglu(self.joined(x)))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _joined(layers: tuple[nn.Linear, ...], joined: Joined | None) -> Joined | None:
    """Join layers, unless they are joined already or cannot be (quantised, or adapted)."""
    if joined is not None and joined.intact:
        return joined
    return Joined(layers) if Joined.possible(layers) else None


def _usable(joined: Joined | None) -> TypeGuard[Joined]:
    """Not in training, where gradients flow to the layers' own parameters, nor after their weights have moved."""
    return joined is not None and not torch.is_grad_enabled() and joined.intact


def _rope(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, 1, m, head_dim), computed where needed: a table would put a limit on positions."""
    angles = positions[:, None, :, None].float() * _frequencies(head_dim, theta, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(head_dim,) float32, each twice. Not a buffer of the module: casting that to bfloat16 would cast these too."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return (theta**-exponent).repeat(2)


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Each row sees itself and all rows before it; padding on the right then harms nobody."""
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)


def biased_attention(attend: Attend, bias: Tensor) -> Attend:
    """`attend` with `bias` (B, m) added to every score of a key, whatever `attend` does otherwise.

    Not a mask: one more channel, 1 in a query and the bias in a key, so that gradients reach the bias through any
    kernel. Eight channels, seven of them 0, keep the width that fast kernels want.
    In bfloat16 the bias is rounded like everything else: by up to 0.1 where it is about 18.
    """

    def run(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        dim = queries.shape[-1]
        wide = dim + 8  # attention will divide by its root
        queries = F.pad(queries * (wide / dim) ** 0.5, (0, 1), value=wide**0.5)
        column = bias.to(keys.dtype)[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
        keys = torch.cat([keys, column], -1)
        return attend(F.pad(queries, (0, 7)), F.pad(keys, (0, 7)), F.pad(values, (0, 8)))[..., :dim]

    return run


def masked_attention(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Attention under a mask (B, m, S) bool."""
    return folded_attention(queries, keys, values, allowed[:, None])
