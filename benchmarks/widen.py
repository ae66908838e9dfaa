r"""A small target and its drafters at a large one's cost: wider, deeper, and saying the same tokens.

    python -m benchmarks.widen testbed/weights/qwen2_5_vl --drafter testbed/weights/qwen2_5_vl-eaglevlm

builds Qwen2.5-VL-7B's decoder (or LLaVA-1.5-7B's) around the trained weights, decodes held-out prompts with both sizes
and says how many answers are equal. So acceptance is real, and so is the cost of every step, without a download.

How a vector of h channels lies in one of H. Blocks of h channels carry it times 1, 1, 2, ...: powers of two whose
squares add up to H / h. RMSNorm then sees the mean square that it saw before, so nothing is rescaled by a number that
bfloat16 would round; its weight is 0 behind block 0, so what a norm gives has one live block. The last channel, the
constant, carries a small number from the embedding to the head, and its square is taken out of the norms' epsilon. The
other channels are 0, always.

Which weights are real. A row of a matrix that the small model does not have reads only channels that are always 0: its
output is exactly 0, whatever stands there. So a wide matrix begins as random numbers, the columns of live channels are
emptied, and the small matrix is put in. Layers, heads, MLP units and tokens that were added are silent in this way, and
the GPU moves and multiplies numbers all the same.

Why no added token is ever said. Zero rows in the head would give the logit 0, which may be the largest. A logit that is
low whatever the picture must read a channel of known sign: added tokens read the constant alone, with a huge negative
weight. Drafters borrow the head, so what they predict carries the constant too. The models' code is unmodified.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.prompts import HELDOUT, questions
from benchmarks.shapes import SEVEN_B, Shape
from speculens import Engine, Sampling, Target, load_drafter, load_target
from speculens.answer import Entry, ask
from speculens.drafters import METHODS, Drafter, TrainedDrafter
from speculens.stats import Stats
from speculens.targets.load import prepare

# What the constant is, how much of it the final norm hands on (so little that features keep their length), and how a
# token that was added weighs it. Powers of two: exact in every format.
LEVEL, FAINT, FORBIDDEN = 2.0**-5, 2.0**-20, -(2.0**60)


@dataclass(frozen=True)
class Space:
    """Where the n numbers of a small vector lie in a wide one.

    copies  (index (n,), factor) of each place that carries them; the first has factor 1 and is the one that is read
    live    index of every place that may ever hold something else than 0
    """

    copies: Sequence[tuple[Tensor, float]]
    live: Tensor

    @property
    def read(self) -> Tensor:
        return self.copies[0][0]


def first(count: int) -> Space:
    """The first `count` of many."""
    index = torch.arange(count)
    return Space([(index, 1.0)], index)


def beside(spaces: Sequence[Space], width: int) -> Space:
    """Vectors of `width`, one behind the other, as the input of one matrix."""
    read, live = (
        torch.cat([index + number * width for number, index in enumerate(indices)])
        for indices in ([space.read for space in spaces], [space.live for space in spaces])
    )
    return Space([(read, 1.0)], live)


def blocks(small: int, wide: int) -> list[float]:
    """Factors of the blocks that carry a vector: powers of two, the first one 1, whose squares add up to wide / small.

    >>> blocks(256, 3584)
    [1.0, 2.0, 2.0, 2.0, 1.0]
    """
    left = wide // small - 1
    factors = [1.0]
    while left:
        factors.append(2.0 ** (int(math.log2(left)) // 2))
        left -= int(factors[-1] ** 2)
    if wide % small or len(factors) * small >= wide:
        raise ValueError(f"{small} channels and a constant do not fit in {wide}: take a larger multiple")
    return factors


class Residual:
    """The residual stream of h channels in one of H, on both sides of a norm."""

    def __init__(self, small: int, wide: int, eps: float) -> None:
        self.small, self.wide = small, wide
        index = torch.arange(small)
        copies = [(index + number * small, factor) for number, factor in enumerate(blocks(small, wide))]
        self.constant = torch.tensor([wide - 1])
        self.stream = Space(copies, torch.cat([*(index for index, _ in copies), self.constant]))
        self.normed = first(small)
        self.eps = eps - LEVEL**2 / wide
        if self.eps <= 0:
            raise ValueError(f"an epsilon of {eps} has no room for the constant channel in a width of {wide}")


def heads(small: tuple[int, int], wide: tuple[int, int], dim: int) -> tuple[Space, Space]:
    """Query heads and KV heads, (number, KV heads) each, so that every query head meets its own KV head.

    A wide KV head serves fewer query heads than a small one did on LLaVA: there a small KV head is put in twice.
    """
    group, wide_group = small[0] // small[1], wide[0] // wide[1]
    repeat = -(-group // wide_group)
    assert small[1] * repeat <= wide[1]
    queries = [
        (head // group * repeat + head % group // wide_group) * wide_group + head % group % wide_group
        for head in range(small[0])
    ]
    keys = [([kv * repeat + turn for kv in range(small[1])], 1.0) for turn in range(repeat)]
    busy = range(small[1] * repeat * wide_group)
    return (
        Space([(_channels(queries, dim), 1.0)], _channels(busy, dim)),
        Space([(_channels(which, dim), factor) for which, factor in keys], _channels(range(small[1] * repeat), dim)),
    )


def _channels(which: Iterable[int], dim: int) -> Tensor:
    return (torch.tensor(list(which))[:, None] * dim + torch.arange(dim)).flatten()


def place(wide: Tensor, small: Tensor | None, out: Space, into: Space) -> None:
    """Put a small matrix (out, in) in a wide random one; without one, all of it stays silent."""
    wide.index_fill_(1, into.live.to(wide.device), 0)
    if small is None:
        return
    read = into.read.to(wide.device)
    for rows, factor in out.copies:
        wide[rows.to(wide.device)[:, None], read] = factor * small.to(wide)


def place_vector(wide: Tensor, small: Tensor | None, space: Space) -> None:
    """The same for a bias or a norm's weight: 0 where nothing is put in."""
    wide.zero_()
    for index, factor in space.copies if small is not None else ():
        wide[index.to(wide.device)] = factor * small.to(wide)


def _place_linear(wide: nn.Module, small: nn.Module | None, out: Space, into: Space) -> None:
    place(wide.weight, None if small is None else small.weight, out, into)
    if wide.bias is not None:
        place_vector(wide.bias, None if small is None else small.bias, out)


@dataclass(frozen=True)
class _Layout:
    """Everything that lies somewhere else in the wide model."""

    residual: Residual
    queries: Space
    keys: Space
    units: Space

    def layer(self, wide: nn.Module, small: nn.Module | None) -> None:
        """A decoder layer of the target or of a drafter: they have the same names. None makes it silent."""
        normed, stream = self.residual.normed, self.residual.stream
        # Some drafters have no norm there: their attention reads the stream, with all its copies and the constant.
        entered = normed if list(wide.get_submodule("input_layernorm").parameters()) else stream
        for name, out, into in (
            ("self_attn.q_proj", self.queries, entered),
            ("self_attn.k_proj", self.keys, entered),
            ("self_attn.v_proj", self.keys, entered),
            ("self_attn.o_proj", stream, self.queries),
            ("mlp.gate_proj", self.units, normed),
            ("mlp.up_proj", self.units, normed),
            ("mlp.down_proj", stream, self.units),
        ):
            _place_linear(wide.get_submodule(name), None if small is None else small.get_submodule(name), out, into)
        for name in ("input_layernorm", "post_attention_layernorm"):
            if list(wide.get_submodule(name).parameters()):
                place_vector(
                    wide.get_submodule(name).weight, None if small is None else small.get_submodule(name).weight, normed
                )


# The target


def widen_target(small: Target, shape: Shape, *, device: torch.device | str, dtype: torch.dtype) -> Target:
    """A real model of this shape, made on `device`, that says what `small` says. Its vision tower stays small.

    The shape's width is a multiple of the small one's, 5 times it or more; its `bias` is not read.
    """
    text = small.text_config
    residual = Residual(small.hidden_size, shape.hidden, text.rms_norm_eps)
    dim = getattr(text, "head_dim", None) or small.hidden_size // text.num_attention_heads
    queries, keys = heads((text.num_attention_heads, text.num_key_value_heads), (shape.heads, shape.kv_heads), dim)
    layout = _Layout(residual, queries, keys, first(text.intermediate_size))
    model = _random_model(small.model, _config(small.model.config, shape, residual.eps), device, dtype)
    with torch.no_grad():
        _copy_equal(model, small.model)
        _place_ends(model, small, residual)
        decoder = model.get_decoder()
        for number, layer in enumerate(decoder.layers):
            layout.layer(layer, small.decoder.layers[number] if number < small.num_layers else None)
    prepare(model)
    return Target(model, small.processor)


def _config(config: Any, shape: Shape, eps: float) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = shape.layers, shape.hidden, shape.mlp
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.vocab_size, text.rms_norm_eps = shape.vocabulary, eps
    config.tie_word_embeddings = text.tie_word_embeddings = False
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * shape.layers
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = shape.hidden
    return config


def _random_model(small: nn.Module, config: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Hugging Face's own initialisation, on the device: 0.02 times normal numbers."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = type(small)._from_config(config, attn_implementation="sdpa", dtype=dtype)  # noqa: SLF001 - no other door
    model.generation_config = copy.deepcopy(small.generation_config)
    return model


def _copy_equal(model: nn.Module, small: nn.Module) -> None:
    """What has the same shape is the same: the vision tower."""
    own = dict(small.named_parameters())
    for name, weight in model.named_parameters():
        if name in own and own[name].shape == weight.shape:
            weight.copy_(own[name])


def _place_ends(model: Any, small: Target, residual: Residual) -> None:
    """Embedding, the picture's projection, final norm and head: where the constant comes in and where it is read."""
    stream, constant = residual.stream, residual.constant
    tokens = first(small.vocab_size)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    norm = model.get_decoder().norm.weight
    place(embedding.T, small.embedding.weight.T, stream, tokens)
    embedding[:, constant] = LEVEL
    for name, out, into in _projections(model, small, stream):
        _place_linear(model.get_submodule(name), small.model.get_submodule(name), out, into)
    model.get_submodule(name).bias[constant] = LEVEL  # of the last one, which writes into the stream
    place_vector(norm, small.decoder.norm.weight, residual.normed)
    norm[constant] = FAINT
    place(head, small.head.weight, tokens, stream)
    head[small.vocab_size :, constant] = FORBIDDEN


def _projections(model: Any, small: Target, stream: Space) -> list[tuple[str, Space, Space]]:
    """The matrices between vision tower and stream, in order."""
    vision = first(model.config.vision_config.hidden_size)
    if small.family == "llava":
        inner, name = first(small.hidden_size), "model.multi_modal_projector"
        return [(f"{name}.linear_1", inner, vision), (f"{name}.linear_2", stream, inner)]
    name = "model.visual.merger.mlp.2"
    return [(name, stream, first(model.get_submodule(name).in_features))]


# Drafters


def widen_drafter(small: Drafter, target: Target) -> Drafter:
    """A drafter of the small target for its wide one, in that one's shape: the same drafts at a large one's cost."""
    if not isinstance(small, TrainedDrafter):
        return small
    config, text = small.config, target.text_config
    residual = Residual(config.target_hidden_size, target.hidden_size, config.rms_norm_eps)
    wide_heads = text.num_attention_heads, text.num_key_value_heads
    queries, keys = heads((config.num_attention_heads, config.num_key_value_heads), wide_heads, config.head_dim)
    layout = _Layout(residual, queries, keys, first(config.intermediate_size))
    made_for = dataclasses.replace(
        config,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
        intermediate_size=text.intermediate_size,
        num_attention_heads=wide_heads[0],
        num_key_value_heads=wide_heads[1],
        rms_norm_eps=residual.eps,
        options=_options(small, wide_heads[0]),
    )
    with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []), target.device:
        torch.manual_seed(1)
        drafter = METHODS[config.speculator_type](made_for).to(target.dtype)
    with torch.no_grad():
        _place_entry(drafter, small, residual)
        layout.layer(drafter.layers[0], small.layers[0])
        for name, part in _PARTS.items():
            if hasattr(small, name) and getattr(small, name) is not None:
                part(getattr(drafter, name), getattr(small, name), residual)
    return drafter.eval().requires_grad_(False)


def _options(small: TrainedDrafter, wide_heads: int) -> dict[str, Any]:
    """A method's own widths: as many heads as the wide target, each as wide as before."""
    options = dict(small.config.options)
    if hasattr(small, "imadpt"):
        options |= {"adaptor_heads": wide_heads, "adaptor_head_dim": small.imadpt.q.shape[2]}
    if "resample" in getattr(small, "operators", ()):
        options["resample_width"] = wide_heads * small.operators["resample"].query.shape[2]
    return options


def _place_entry(wide: TrainedDrafter, small: TrainedDrafter, residual: Residual) -> None:
    """`fc` reads block 0 of embedding and feature, writes the stream, and puts the constant in."""
    parts = small.fc.in_features // residual.small
    _place_linear(wide.fc, small.fc, residual.stream, beside([residual.stream] * parts, residual.wide))
    wide.fc.bias[residual.constant] = LEVEL


def _place_steps(wide: Tensor, small: Tensor, residual: Residual) -> None:
    wide.zero_()
    wide[:, residual.normed.read] = small.to(wide)


def _place_adaptor(wide: nn.Module, small: nn.Module, residual: Residual) -> None:
    """Its rows enter the layer without `fc`, so the constant must pass: the last channel of the heads carries it."""
    count, dim = small.q.shape[1:]
    inner, _ = heads((count, count), (wide.q.shape[1],) * 2, dim)
    wide.q[:, :count] = small.q.to(wide.q)
    for name in ("k_proj", "v_proj"):
        _place_linear(wide.get_submodule(name), small.get_submodule(name), inner, residual.stream)
    _place_linear(wide.o_proj, small.o_proj, residual.stream, inner)
    carrier = wide.v_proj.out_features - 1
    wide.v_proj.weight[carrier, residual.constant] = 1
    wide.o_proj.weight[:, carrier] = 0
    wide.o_proj.weight[residual.constant, carrier] = 1


def _place_fusion(wide: nn.Module, small: nn.Module, residual: Residual) -> None:
    parts = small.in_features // residual.small
    _place_linear(wide, small, residual.stream, beside([residual.stream] * parts, residual.wide))


def _place_operators(wide: nn.ModuleDict, small: nn.ModuleDict, residual: Residual) -> None:
    read, stream = residual.normed.read, residual.stream
    if "conv" in small:
        mine, theirs = wide["conv"].weight, small["conv"].weight
        if mine.ndim == 2:
            mine[read] = theirs.to(mine)
        else:
            for offset in range(mine.shape[2]):
                place(mine[..., offset], theirs[..., offset], stream, stream)
    if "resample" in small:
        mine, theirs = wide["resample"], small["resample"]
        count, dim = theirs.query.shape[0], theirs.query.shape[2]
        inner, _ = heads((count, count), (mine.query.shape[0],) * 2, dim)
        mine.query[:count] = theirs.query.to(mine.query)
        for name in ("k_proj", "v_proj"):
            _place_linear(mine.get_submodule(name), theirs.get_submodule(name), inner, stream)
        _place_linear(mine.o_proj, theirs.o_proj, stream, inner)


def _place_gate(wide: nn.Sequential, small: nn.Sequential, residual: Residual) -> None:
    _place_linear(wide[0], small[0], first(small[0].out_features), residual.stream)
    wide[2].load_state_dict(small[2].state_dict())


# What some drafters have besides `fc` and the layer, by attribute.
_PARTS: Mapping[str, Any] = {
    "residual": _place_steps,
    "imadpt": _place_adaptor,
    "img_fc": _place_fusion,
    "operators": _place_operators,
    "gate": _place_gate,
}


# From the command line


def larger(target: Target) -> Shape:
    """Five times as wide, the least that fits, and a little deeper: for tests and dry runs on a CPU."""
    text, hidden = target.text_config, 5 * target.hidden_size
    count = hidden * text.num_attention_heads // target.hidden_size
    return Shape(
        layers=target.num_layers + 2,
        hidden=hidden,
        heads=count,
        kv_heads=count if target.family == "llava" else 2,  # as many and as few as the large ones have
        mlp=text.intermediate_size + 16,
        vocabulary=target.vocab_size + 64,
    )


def main() -> None:
    """Decode the same prompts with the small and with the wide target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a testbed target: LLaVA's or Qwen2.5-VL's architecture")
    parser.add_argument("--drafter", nargs="*", default=[])
    parser.add_argument("--shape", choices=["7b", "larger"], default="7b", help="larger: five times as wide, for a CPU")
    parser.add_argument("--prompts", nargs="+", type=Path, default=[HELDOUT / "charts.jsonl"])
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    given = parser.parse_args()
    small = load_target(given.target, device=given.device, dtype=given.dtype)
    shape = SEVEN_B[small.family] if given.shape == "7b" else larger(small)
    wide = widen_target(small, shape, device=given.device, dtype=given.dtype)
    prompts = [small.encode(question) for question in questions(given.prompts, given.limit)]
    sampling = Sampling(max_new_tokens=given.max_new_tokens)
    rows = []
    for name in ["none", *given.drafter]:
        drafter = load_drafter(name, device=given.device, dtype=given.dtype, int8=False)
        one, other = (
            [ask(engine, prompt, sampling) for prompt in prompts]
            for engine in (Engine(small, drafter), Engine(wide, widen_drafter(drafter, wide)))
        )
        entry = Entry(Path(name).name, other, one)
        lengths = [Stats.total(a.generation.stats for a in answers).mean_acceptance_length for answers in (one, other)]
        rows.append({"drafter": entry.drafter, "exact": entry.num_exact / len(prompts), "lengths": lengths})
        print(
            f"{entry.drafter:24s} equal {entry.num_exact}/{len(prompts)}  length {lengths[0]:.3f} -> {lengths[1]:.3f}"
        )
    print(json.dumps({"shape": dataclasses.asdict(shape), "dtype": str(given.dtype), "drafters": rows}))


if __name__ == "__main__":
    main()
