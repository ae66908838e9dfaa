"""Our attention inside an unmodified Hugging Face decoder, for targets that would use sdpa there.

Under a mask, transformers' sdpa repeats K/V to the number of query heads: a 7-fold copy of the whole cache in every
layer and step on Qwen2.5-VL-7B. Ours copies nothing. It is registered under a name of its own; prefill without a mask
and vision towers keep sdpa.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from speculens.attention import TreeMask, folded_attention, tree_attention

NAME = "speculens_tree"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: TreeMask | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with query (B, Hq, N, D), key and value (B, Hkv, S, D) -> (B, N, Hq, D).

    tree  who sees whom, as the decoder was told in its call; `attention_mask` is not read then
    """
    if tree is not None:
        mixed = tree_attention(query, key, value, tree, scaling, sliding_window)
    elif attention_mask is not None and query.shape[1] > key.shape[1]:
        mixed = folded_attention(query, key, value, attention_mask, scaling)
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return mixed.transpose(1, 2).contiguous(), None


def is_ours(decoder: Any) -> bool:
    """Whether a decoder attends by `attention_forward`."""
    return decoder.config._attn_implementation == NAME  # noqa: SLF001 - there is no public name for it


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it, prefill would get no padding or image-block mask


def install_attention(model: PreTrainedModel) -> None:
    """Let a model of ours use it in its text decoder, if that would otherwise run sdpa."""
    decoder = model.get_decoder()
    if decoder.config._attn_implementation == "sdpa":  # noqa: SLF001
        decoder.set_attn_implementation(NAME)
