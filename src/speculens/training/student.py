"""The drafter as a student of the target: how it is made, what it reads, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from speculens.checkpoints import load_drafter
from speculens.drafters import METHODS, DrafterConfig, TrainedDrafter
from speculens.errors import UserError
from speculens.features import Features
from speculens.ops import send
from speculens.targets.base import Target
from speculens.targets.processing import pixel_bounds
from speculens.training.batches import Batch
from speculens.training.config import DrafterRecipe, Unroll
from speculens.training.unroll import Lesson, unroll


def make_drafter(recipe: DrafterRecipe, target: Target) -> TrainedDrafter:
    """A fresh drafter whose layer is of the target's own kind: heads, head width, biases, RoPE base, norm epsilon."""
    kind, text = METHODS[recipe.method], target.text_config
    heads = text.num_attention_heads
    queries = getattr(target.decoder.layers[0].self_attn, "q_proj", None)
    least, most = pixel_bounds(target.processor)
    config = DrafterConfig(
        speculator_type=recipe.method,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
        target_family=target.family,
        intermediate_size=recipe.intermediate_size or text.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or target.hidden_size // heads,
        image_contract=kind.image_contract,
        draft_vocab_size=recipe.draft_vocab_size,
        min_pixels=least,
        max_pixels=most,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(text),
        qkv_bias=getattr(queries, "bias", None) is not None,
        input_norm=recipe.input_norm,
        tree=recipe.tree,
        options=kind.settle(recipe.options, target.model.config),
    )
    drafter = kind(config)
    if recipe.init_from is not None:
        earlier = load_drafter(recipe.init_from, target=target)
        if not isinstance(earlier, TrainedDrafter):
            raise UserError(f"drafter.init_from must be a trained drafter, which {recipe.init_from} is not.")
        drafter.adopt(earlier.state_dict())
    return drafter


def _rope_theta(text: Any) -> float:
    """The RoPE base; where layers differ in it, that of full attention."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


class _Reader(nn.Module):
    """View, noise and all steps in one forward."""

    def __init__(self, drafter: TrainedDrafter, plan: Unroll, noise: float) -> None:
        super().__init__()
        self.drafter, self.plan, self.noise = drafter, plan, noise

    def forward(self, features: Features, next_embeds: Tensor, draw: int) -> tuple[tuple[Tensor, ...], Tensor]:
        rows = self.drafter.view(features, next_embeds)
        source = cast(Tensor, rows.source)  # only decoding knows rows without
        if self.noise:
            rows = replace(rows, hidden=_noisy(rows.hidden, source, self.noise, draw))
        return unroll(self.drafter, rows, self.plan), source


def _noisy(hidden: Tensor, source: Tensor, scale: float, draw: int) -> Tensor:
    """Features plus (U - 0.5) scale 512 / rows of the sequence, U uniform on [0, 1); one `draw`, one noise."""
    generator = torch.Generator(hidden.device).manual_seed(draw)
    uniform = torch.rand(hidden.shape, generator=generator, device=hidden.device)
    width = send(scale * 512 / (source >= 0).sum(1).clamp(min=1), hidden.device)
    return hidden + ((uniform - 0.5) * width[:, None, None]).to(hidden.dtype)


class Student(nn.Module):
    """What data parallelism wraps: the drafter over whole sequences. Embedding and head stay the target's.

    dtype  of its arithmetic. Weights may be wider: then each pass rounds them as decoding will, and the optimiser keeps
           what rounding would lose. What comes in from the target is cast to it.
    plan   how it practises on its own output; None: not at all
    noise  scale of what is added to the features that it reads
    """

    def __init__(
        self, drafter: TrainedDrafter, dtype: torch.dtype, plan: Unroll | None = None, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.reader, self.dtype = _Reader(drafter, plan or Unroll(), noise), dtype

    def forward(self, features: Features, next_embeds: Tensor, draw: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
        """Predicted features of each step, (B, m, H), and which slot each row stands for, (B, m) long, -1 for none.

        draw  the number that decides the noise
        """
        features = replace(features, hidden=features.hidden.to(self.dtype), embeds=features.embeds.to(self.dtype))
        weights = {name: weight.to(self.dtype) for name, weight in self.reader.named_parameters()}
        return functional_call(self.reader, weights, (features, next_embeds.to(self.dtype), draw))


def distil(student: Callable[..., Any], target: Target, batch: Batch, draw: int = 0) -> Lesson:
    """One pass of target and student: predicted and true features of the positions that train."""
    features = target.teach(batch.inputs, batch.image)
    sequence, slot = batch.slots
    answer = torch.zeros_like(features.image)
    answer[sequence, slot + 1] = True
    known = Features(
        tokens=features.tokens[:, :-1],
        hidden=features.hidden[:, :-1],
        embeds=features.embeds[:, :-1],
        positions=features.positions[:, :-1],
        image=features.image[:, :-1],
        lengths=features.lengths - 1,
        answer=answer[:, :-1],
    )
    steps, source = student(known, features.embeds[:, 1:], draw)
    where = torch.stack([sequence, _place(source, known.tokens.shape[1])[sequence, slot], slot + 1])
    row, place, following = send(where, features.hidden.device)
    steps = tuple(predicted[row, place] for predicted in steps)
    return Lesson(steps, features.hidden[row, following], torch.stack([row, place]), tuple(source.shape))


def _place(source: Tensor, slots: int) -> Tensor:
    """(B, slots) long: the row that stands for each slot, the inverse of `source` (B, m)."""
    batch, rows = source.shape
    place = torch.zeros(batch, slots + 1, dtype=torch.long)  # the last column swallows padding
    index = torch.where(source < 0, slots, source)
    return place.scatter_(1, index, torch.arange(rows).expand(batch, -1))[:, :slots]
