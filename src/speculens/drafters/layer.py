"""The one decoder layer that every trained drafter has: attention with 1-D RoPE, SwiGLU, RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculens.attention import folded_attention
from speculens.drafters.config import DrafterConfig
from speculens.fused_layer import FusedLayer, Norm
from speculens.ops import Joined, rotate

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
        self._eps = eps
        self._fused: FusedLayer | None = None

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Rows x (B, m, H) at positions (B, m) -> (B, m, H). No final norm (the output is a target feature)."""
        x = x + self.self_attn(self.input_layernorm(x), positions, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def fused(self) -> FusedLayer:
        """The same layer for decoding, over the same weights; made anew if they were cast, moved or pressed."""
        if not (self._fused and self._fused.intact and self._fused.output is self.self_attn.o_proj):
            attention, mlp, norms = self.self_attn, self.mlp, (self.input_layernorm, self.post_attention_layernorm)
            before, after = (Norm(norm.weight, self._eps) if isinstance(norm, nn.RMSNorm) else None for norm in norms)
            self._fused = FusedLayer(
                input_norm=before,
                qkv=Joined([attention.q_proj, attention.k_proj, attention.v_proj]),
                output=attention.o_proj,
                post_norm=after,
                gate_up=Joined([mlp.gate_proj, mlp.up_proj]),
                down=mlp.down_proj,
                scale=attention.head_dim**-0.5,
            )
        return self._fused


class _Attention(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        size, bias = config.target_hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        cos, sin = rotary(positions[:, None], self.head_dim, self.theta, x.dtype)
        queries, keys, values = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
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

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., head_dim) of positions (...), for `ops.rotate`."""
    angles = positions[..., None].float() * _frequencies(head_dim, theta, positions.device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """(head_dim / 2,) float32. Not a buffer of the module: casting that to bfloat16 would cast these too."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return theta**-exponent


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
