"""The target's text decoder of fused layers, over the model's own weights: for scoring, and for plain prompts.

Whether a decoder is of the common build (`fused_layer.py`) is asked of its modules, and whether it then computes the
same is tried out on a few rows; any other decoder stays with Hugging Face. So does a prompt whose rows bring more than
embeddings and positions.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from speculens.attention import TreeMask, tree_attention
from speculens.cache import SlotCache
from speculens.fused_layer import Attend, FusedLayer, Norm
from speculens.ops import Joined, add_norm, is_watched

log = logging.getLogger(__name__)

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
HEAD_NORMS = {"q_norm", "k_norm"}
GATES = ("gate_proj", "up_proj")
TRIAL_ROWS = 8


class FusedDecoder:
    """Takes new rows as the decoder that it is made of would. Raises ValueError if that is not built as expected."""

    def __init__(self, decoder: Any) -> None:
        if fault := next(_faults(decoder), None):
            raise ValueError(fault)
        self._decoder = decoder
        self._layers = [_layer(layer) for layer in decoder.layers]
        self._parts = _parts(decoder)
        self.axes = 3 if hasattr(decoder.rotary_emb, "mrope_section") else 1  # of a position
        self._check()

    @property
    def intact(self) -> bool:
        """Whether the decoder is still what was fused: a cast, a move, an adapter or a hook in its layers ends that."""
        now = _parts(self._decoder)
        same = len(now) == len(self._parts) and all(map(operator.is_, now, self._parts))
        watched = any(map(is_watched, self._decoder.layers.modules()))
        return same and not watched and all(layer.intact for layer in self._layers)

    @property
    def reach(self) -> float:
        """How many columns every layer sees, whatever its sliding window."""
        return min(layer.window or float("inf") for layer in self._layers)

    def __call__(self, embeds: Tensor, positions: Tensor, cache: SlotCache, attend: Attend) -> Tensor:
        """Rows (B, N, H), written where the cache was last aimed -> hidden states after the final norm (B, N, H).

        positions  (B, N), or M-RoPE's (3, B, N); in drafted rows all axes of an M-RoPE position are the same number
        """
        if self.axes > 1 and positions.ndim == 2:
            positions = positions.expand(self.axes, -1, -1)
        turn = self._decoder.rotary_emb(embeds, positions)
        stream, update = embeds, None
        for number, layer in enumerate(self._layers):
            stream, update = layer(stream, update, turn, cache, number, attend)
        return add_norm(stream, update, *_norm(self._decoder.norm))[1]

    @torch.no_grad()
    def _check(self) -> None:
        """Try it beside the decoder: another activation, norm, rotation or multiplier shows at once.

        Bounds are far above what rounding makes of deep half-precision models, and far below what a change of
        arithmetic makes.
        """
        embedding = self._decoder.embed_tokens
        device, dtype = embedding.weight.device, embedding.weight.dtype
        tokens = torch.arange(TRIAL_ROWS, device=device)[None] * (len(embedding.weight) // TRIAL_ROWS)
        embeds = embedding(tokens)
        theirs = self._decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        attention = self._decoder.layers[0].self_attn
        cache = SlotCache(
            slots=1,
            capacity=TRIAL_ROWS,
            heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            dtype=dtype,
            devices=[device] * len(self._layers),
        )
        cache.admit()
        cache.aim(range(1), TRIAL_ROWS)
        before = torch.ones(1, TRIAL_ROWS, TRIAL_ROWS, dtype=torch.bool, device=device).tril()
        positions = torch.arange(TRIAL_ROWS, device=device)[None]
        mask = TreeMask(cache.lengths, before, positions)
        ours = self(embeds, positions, cache, partial(tree_attention, mask=mask))
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        bound = 0.1 if dtype.itemsize == 2 else 1e-3
        if not error < bound:
            raise ValueError(f"its outputs differ from what fused layers compute (relative error {error:.1e})")


def fuse(decoder: nn.Module) -> FusedDecoder | None:
    """The fused form of a decoder, or None, with a line in the log, where it must stay as it is."""
    try:
        return FusedDecoder(decoder)
    except Exception as error:  # noqa: BLE001 - a device or compiler may fail in any way; the decoder itself remains
        log.info("%s is used as it is: %s", type(decoder).__name__, error)
        return None


def _parts(decoder: Any) -> list[Any]:
    """All modules and parameters of the layers."""
    return [*decoder.layers.modules(), *decoder.layers.parameters()]


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.variance_epsilon)


def _faults(decoder: Any) -> Iterator[str]:
    """What about a decoder is not of the common build. Only the first is sure to be named."""
    if _children(decoder) != DECODER:
        yield f"it consists of {', '.join(sorted(_children(decoder)))}"
    if not all(hasattr(norm, "variance_epsilon") for name, norm in decoder.named_modules() if name.endswith("norm")):
        yield "its norms are of another kind"
    if len({p.device for p in decoder.parameters()}) != 1:
        yield "it is spread over several devices"
    for layer in decoder.layers:
        if _children(layer) != LAYER:
            yield f"its layers consist of {', '.join(sorted(_children(layer)))}"
        attention, mlp = layer.self_attn, layer.mlp
        extra = _children(attention) - {*PROJECTIONS, "o_proj", "rotary_emb"}
        if extra not in (set(), HEAD_NORMS) or _children(mlp) != {*GATES, "down_proj", "act_fn"}:
            yield "its attention or MLP has other parts"
        groups = [_named(attention, PROJECTIONS), _named(mlp, GATES), [attention.o_proj], [mlp.down_proj]]
        if not all(Joined.possible(group) for group in groups):
            yield "its projections are not plain linear layers"
        if any(map(is_watched, layer.modules())):
            yield "something listens to its layers"


def _layer(layer: Any) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    gains = None
    if _children(attention) >= HEAD_NORMS:
        gains = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
    return FusedLayer(
        input_norm=_norm(layer.input_layernorm),
        qkv=Joined(_named(attention, PROJECTIONS)),
        output=attention.o_proj,
        post_norm=_norm(layer.post_attention_layernorm),
        gate_up=Joined(_named(mlp, GATES)),
        down=mlp.down_proj,
        scale=attention.scaling,
        window=getattr(attention, "sliding_window", None),
        gains=gains,
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _named(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    return [getattr(module, name) for name in names]
