"""Attention over prefix and tree without copying keys and values for each query head.

Under a mask, transformers' sdpa repeats K/V to the number of query heads: a 7-fold copy of the whole cache in every
layer and step on Qwen2.5-VL-7B. Folding the head group into the query axis computes the same without the copy. It is
registered under a name of its own and chosen for targets that would use sdpa; prefill and vision towers keep sdpa.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "speculens_folded"


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with query (B, Hq, N, D), key and value (B, Hkv, S, D) and an additive mask -> (B, N, Hq, D).

    The mask is (B, 1, N, S), or (B, 1, G N, S) with the G = Hq / Hkv query heads of a group folded in already.
    """
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    folded = query.reshape(batch, key.shape[1], groups * rows, dim)
    mask = attention_mask if attention_mask.shape[2] == groups * rows else attention_mask.repeat(1, 1, groups, 1)
    mixed = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return mixed.view(batch, heads, rows, dim).transpose(1, 2).contiguous(), None


def groups_in_mask(config: PretrainedConfig) -> int:
    """How often the rows of a mask may be repeated beforehand, once for all layers: 1 where attention is not ours."""
    if config._attn_implementation != NAME:  # noqa: SLF001 - there is no public name for it
        return 1
    return config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


AttentionInterface.register(NAME, folded_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, prefill would get no padding or image-block mask


def fold_attention(model: PreTrainedModel) -> None:
    """Let a model of ours use it in its text decoder, if that would otherwise run sdpa."""
    decoder = model.get_decoder()
    if decoder.config._attn_implementation == "sdpa":  # noqa: SLF001 - there is no public name for it
        decoder.set_attn_implementation(NAME)
