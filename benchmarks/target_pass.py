r"""What a target pass and growing a tree cost, and their parts: kernels checked, then timed beside what they replace.

    python -m benchmarks.target_pass --out target_pass.json   (a GPU, about two minutes)
    python -m benchmarks.target_pass --products [--int8]      (a GPU, 90 seconds: products of few rows by tile)
    python -m benchmarks.target_pass --tiny                   (any machine: runs every line, says nothing of speed)

A pass over one node reads all weights once; that time is the floor, printed beside each figure. Everything is timed as
a replayed CUDA graph, median of `--repeats`. Decoders have the shapes of 7B models and random weights. Parts that fail
are reported and do not stop the others. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.shapes import SEVEN_B, Shape
from speculens import ops
from speculens import tree as tree_file
from speculens.attention import TreeMask, causal_attention, folded_attention, tree_attention
from speculens.cache import SlotCache, cache_arguments
from speculens.drafters import grow as grow_file
from speculens.drafters.grow import Beam, Created, best, extend, grow, likeliest
from speculens.int8 import press
from speculens.targets.attention import NAME
from speculens.targets.fused import FusedDecoder
from speculens.tree import DraftTree, TreeShape

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
PREFIX, BUCKET, NODES = 1200, 1280, 60
START = time.perf_counter()
FIGURES: dict[str, Any] = {}
TINY = {"tiny": Shape(2, 64, 4, 2, 96, 320, bias=True)}
ROW_COUNTS = (10, 16, 32, NODES)
ROW_TILES = [  # outputs, inputs, warps, programs a processor: see `kernels.Tile`
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 2),
    (64, 256, 4, 1),
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 8, 2),
    (128, 64, 8, 1),
    (128, 128, 4, 1),
    (128, 128, 8, 1),
    (128, 128, 8, 2),
    (256, 64, 8, 1),
    (256, 64, 8, 2),
    (256, 128, 8, 1),
]
INT8_TILES = [
    (64, 128, 4, 2),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 256, 4, 1),
    (64, 256, 4, 2),
    (64, 256, 4, 3),
    (64, 512, 4, 1),
    (64, 512, 4, 2),
    (128, 128, 4, 2),
    (128, 128, 8, 2),
    (128, 256, 4, 1),
    (128, 256, 8, 1),
    (128, 256, 8, 2),
    (256, 128, 8, 1),
]
VOCABULARIES = (32064, 32768, 152064)
TILES = [(8, 512, 4), (4, 1024, 4), (4, 512, 4), (2, 1024, 4), (16, 256, 4), (1, 2048, 4)]


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--products", action="store_true", help="only the products of few rows, by tile")
    parser.add_argument("--int8", action="store_true", help="the same for weights in 8 bits")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    repeats = 2 if given.tiny else given.repeats
    FIGURES["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    FIGURES["torch"] = torch.__version__
    shapes = TINY if given.tiny else SEVEN_B
    if given.products:
        part("products_of_few_rows", lambda: time_few_rows(shapes, repeats, int8=given.int8))
    else:
        part("correct", check_kernels)
        part("drafting", lambda: time_drafting(repeats, *(((320,), 64) if given.tiny else (VOCABULARIES, 3584))))
        part("attention", lambda: time_attention(repeats, (128,) if given.tiny else (PREFIX, 8192, 32768)))
        for name, shape in shapes.items():
            part(name, lambda name=name, shape=shape: time_decoder(name, shape, repeats))
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    FIGURES["seconds"] = round(time.perf_counter() - START, 1)
    line = json.dumps(FIGURES)
    if given.out:
        given.out.write_text(line + "\n")
    print(line)


def part(name: str, run: Callable[[], Any]) -> None:
    """One section: its result, or its failure, goes into the figures."""
    try:
        FIGURES[name] = run()
    except Exception as error:  # noqa: BLE001 - GPU minutes are few: the other sections still count
        traceback.print_exc()
        FIGURES[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def clock(run: Callable[[], Any], repeats: int, inner: int = 1) -> float:
    """Median milliseconds of `run`, as a CUDA graph of `inner` calls where there is a GPU."""
    run()
    if not CUDA:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / inner


@contextmanager
def plain_torch() -> Iterator[None]:
    """No kernels of ours in here, attention apart."""
    files = ops, grow_file, tree_file
    chosen = [file.kernels_for for file in files]
    try:
        for file in files:
            file.kernels_for = lambda *_: None
        yield
    finally:
        for file, own in zip(files, chosen, strict=True):
            file.kernels_for = own


# Correctness


def check_kernels() -> dict[str, float]:  # noqa: C901 - a list of cases
    """Largest difference between each kernel and float64 torch, over the size of the latter."""
    if ops.kernels_for(torch.zeros(1, device=DEVICE)) is None:
        say("no kernels on this device: torch is compared with itself")
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    def compare(name: str, got: Tensor, want: Tensor) -> None:
        errors[name] = float((got.double() - want.double()).abs().max() / want.double().abs().max())
        say(f"correct: {name:44s} {errors[name]:.1e}{'  <-- LARGE' if not errors[name] < 2e-2 else ''}")

    cases = [
        (28, 4, 1, 1, 128, [1200], None),
        (28, 4, 60, 60, 128, [1200], None),
        (32, 32, 60, 60, 128, [1200, 3], None),
        (8, 2, 7, 12, 64, [700, 0, 65], None),
        (4, 4, 100, 100, 80, [100, 300], None),
        (8, 2, 20, 20, 64, [500, 5], 128),
        (8, 2, 10, 10, 256, [200], None),
    ]
    for heads, kv_heads, nodes, width, dim, lengths, window in cases:
        for dtype in (DTYPE, torch.float32):
            batch, columns = len(lengths), max(lengths) + width + 30
            queries = randn(batch, nodes, heads, dim, dtype=dtype).transpose(1, 2)
            keys, values = (randn(batch, columns, kv_heads, dim, dtype=dtype).transpose(1, 2) for _ in "kv")
            seen = torch.rand(batch, nodes, width, generator=generator) < 0.4
            seen = (seen | torch.eye(nodes, width, dtype=torch.bool)).to(DEVICE)
            depth = torch.randint(0, 5, (batch, nodes), generator=generator).to(DEVICE)
            mask = TreeMask(torch.tensor(lengths, device=DEVICE), seen, depth)
            want = tree_attention(queries.double(), keys.double(), values.double(), mask, None, window)
            name = f"attention {heads}/{kv_heads} x{dim} N={nodes} B={batch} window={window} {str(dtype)[6:]}"
            compare(name, tree_attention(queries, keys, values, mask, None, window), want)
    for rows, columns in ((300, 300), (70, 300)):  # a prompt, and its last piece
        queries = randn(1, rows, 28, 128).transpose(1, 2)
        keys, values = (randn(1, columns + 30, 4, 128)[:, :columns].transpose(1, 2) for _ in "kv")
        want = causal_attention(queries.double(), keys.double(), values.double())
        compare(f"causal attention {rows} of {columns}", causal_attention(queries, keys, values), want)
    for size in (3584, 4096, 200):
        stream, update, gain = randn(3, 5, size), randn(3, 5, size), randn(size)
        want = ops.add_norm(stream.double(), update.double(), gain.double(), 1e-6)[1]
        compare(f"add_norm {size}", ops.add_norm(stream, update, gain, 1e-6)[1], want)
        gate_up = randn(3, 5, 2 * size)
        compare(f"swiglu {size}", ops.swiglu(gate_up), ops.swiglu(gate_up.double()))
    for gains in (None, (randn(128), randn(128), 1e-6)):
        joined, cos, sin = randn(2, 5, 8 * 128), randn(2, 5, 128), randn(2, 5, 128)
        wide = gains and (gains[0].double(), gains[1].double(), gains[2])
        outs = []
        for states, norms in ((joined.clone(), gains), (joined.double(), wide)):
            cache = _cache(2, 64, 2, 128, 1, states.dtype, [7, 30], 5)
            turn = cos.to(states.dtype), sin.to(states.dtype)
            outs.append(ops.rotate_into(cache, 0, states, *turn, norms))
        for what, got, want in zip(("queries", "keys", "values"), *outs, strict=True):
            compare(f"rotate_into {what} {'with' if gains else 'without'} norms", got, want)
    _check_drafting(compare, generator)
    if CUDA:
        _check_products(compare, randn)
    return errors


def _check_products(compare: Callable[[str, Tensor, Tensor], None], randn: Callable[..., Tensor]) -> None:
    from speculens import kernels  # noqa: PLC0415 - there need not be Triton elsewhere

    for outputs, inputs in ((3584, 18944), (37, 700)):
        weight, bias = randn(outputs, inputs), randn(outputs)
        numbers, scales = press(weight)
        for rows in (1, 2, 16, 33, 64, 150):
            states = randn(1, rows, inputs)
            want = F.linear(states.double(), weight.double(), bias.double())
            if rows == 1:
                for n, k, warps in TILES:
                    got = kernels.linear_row(states, weight, bias, block_n=n, block_k=k, num_warps=warps)
                    compare(f"linear_row {outputs}x{inputs} {(n, k, warps)}", got, want)
            else:
                compare(f"linear_rows {outputs}x{inputs} N={rows}", kernels.linear_rows(states, weight, bias), want)
            want = F.linear(states.double(), numbers.double() * scales, bias.double())
            compare(f"int8 {outputs}x{inputs} N={rows}", ops.linear(states, numbers, bias, scales), want)


def _cache(
    slots: int, capacity: int, heads: int, dim: int, layers: int, dtype: torch.dtype, lengths: list[int], n: int
) -> SlotCache:
    cache = SlotCache(slots=slots, capacity=capacity, heads=heads, head_dim=dim, dtype=dtype, devices=[DEVICE] * layers)
    for _ in range(slots):
        cache.admit()
    cache.lengths += torch.tensor(lengths, device=DEVICE)
    cache.extents[:] = lengths
    cache.aim(range(slots), n)
    return cache


def _check_drafting(compare: Callable[[str, Tensor, Tensor], None], generator: torch.Generator) -> None:
    for size, count, dtype in ((152064, 10, DTYPE), (32064, 16, DTYPE), (1000, 32, torch.float32), (40, 1, DTYPE)):
        logits = torch.randn(2, 5, size, generator=generator).to(DEVICE, dtype)
        scores, tokens = likeliest(logits, count)
        with plain_torch():
            want, theirs = likeliest(logits, count)
        compare(f"likeliest {size} scores", scores, want)
        # Several logits may be equal, so that other tokens are as good, but none may come twice.
        compare(f"likeliest {size} logits", logits.gather(-1, tokens), logits.gather(-1, theirs))
        distinct = torch.tensor([len(row.unique()) for row in tokens.flatten(0, 1)])
        compare(f"likeliest {size} distinct tokens", distinct, torch.full_like(distinct, count))
    for shape in (TreeShape(), TreeShape(2, 4, 20), TreeShape(6, 12, 250), TreeShape(0, 1, 2), TreeShape(9, 1, 60)):
        head, embed = (torch.randn(64, 500, generator=generator).to(DEVICE) for _ in "he")
        hidden, roots = torch.randn(3, 64, generator=generator).to(DEVICE), torch.arange(3, device=DEVICE)

        def propose(hidden: Tensor, count: int, head: Tensor = head) -> tuple[Tensor, Tensor]:
            return (hidden @ head).log_softmax(-1).topk(count)

        def expand(tokens: Tensor, above: Tensor, _: int, lineage: Tensor, embed: Tensor = embed) -> Tensor:
            return (embed.T[tokens] + above + lineage.sum(2, keepdim=True)).sin()

        tree = grow(roots, hidden, propose, expand, shape)
        want = torch.zeros_like(tree.tokens).scatter_(1, tree.parents, tree.tokens)  # some child of each node
        path, counts = tree.follow(want)
        with plain_torch():
            same = grow(roots, hidden, propose, expand, shape)
            their_path, their_counts = same.follow(want)
        compare(f"follow {shape.levels} levels: counts", counts, their_counts)
        beyond = torch.arange(path.shape[1], device=DEVICE) >= counts[:, None]
        compare(f"follow {shape.levels} levels: path", *(1 + p.masked_fill(beyond, 0) for p in (path, their_path)))
        for what in ("tokens", "parents", "depth", "live", "ancestors"):
            compare(f"grow {shape.levels} levels: {what}", 1 + getattr(tree, what), 1 + getattr(same, what))


# Growing a tree


def time_drafting(repeats: int, vocabularies: tuple[int, ...], size: int) -> dict[str, Any]:
    """The default tree's growth step by step, without the drafter's layer, and following it: microseconds each.

    size  of the hidden rows
    """
    shape = TreeShape()
    width = shape.topk
    roots = torch.zeros(1, dtype=torch.long, device=DEVICE)
    hidden = torch.randn(1, width, size, device=DEVICE, dtype=DTYPE)
    runs: dict[str, Callable[[], Any]] = {}
    for vocabulary in vocabularies:
        logits = torch.randn(1, width, vocabulary, device=DEVICE, dtype=DTYPE)
        for rows in (1, width):
            runs[f"likeliest of {rows} x {vocabulary}"] = lambda x=logits[:, :rows]: likeliest(x, width)

        def propose(above: Tensor, count: int, logits: Tensor = logits) -> tuple[Tensor, Tensor]:
            return likeliest(logits[:, : above.shape[1]], count)

        runs[f"all of grow, {vocabulary}"] = lambda propose=propose: grow(
            roots, hidden[:, 0], propose, lambda _tokens, above, *_: above, shape
        )
    created, (gains, drafted) = Created.under(roots, shape.candidates), likeliest(logits, width)
    own = torch.eye(width, dtype=torch.bool, device=DEVICE)[None]
    beam = Beam(gains[:, 0], drafted[:, 0], drafted[:, 0], own, hidden)
    runs["extend"] = lambda: extend(created, beam, hidden, gains, drafted, 1 + width, 2)
    runs["best"] = lambda: best(created, shape)
    tree = _tree(NODES, 300)
    runs["follow"] = lambda: tree.follow(tree.tokens)
    found = {}
    for what, run in runs.items():
        found[what] = 1e3 * clock(run, repeats, 20)
        with plain_torch():
            found[f"{what}, plain torch"] = 1e3 * clock(run, max(10, repeats // 3), 5)
        say(f"drafting: {what} {found[what]:.1f} us, in plain torch {found[f'{what}, plain torch']:.1f} us")
    return found


# Attention alone


def time_attention(repeats: int, spans: tuple[int, ...]) -> list[dict[str, Any]]:
    """Split kernel against folded sdpa, microseconds a layer."""
    lines = []
    for heads, kv_heads in ((28, 4), (32, 32)):
        for span in spans:
            for nodes in (1, NODES, 64):
                bucket = -(-(span + nodes) // 64) * 64
                queries = torch.randn(1, nodes, heads, 128, device=DEVICE, dtype=DTYPE).transpose(1, 2)
                keys, values = (
                    torch.randn(1, bucket, kv_heads, 128, device=DEVICE, dtype=DTYPE).transpose(1, 2) for _ in "kv"
                )
                tree = _tree(nodes, 300)
                mask = TreeMask(torch.tensor([span], device=DEVICE), tree.ancestors)
                additive = mask.additive(bucket, DTYPE, heads // kv_heads)
                line = {"heads": f"{heads}/{kv_heads}", "columns": span, "nodes": nodes}
                line["ours_us"] = 1e3 * clock(
                    lambda q=queries, k=keys, v=values, m=mask: tree_attention(q, k, v, m), repeats, 10
                )
                line["folded_sdpa_us"] = 1e3 * clock(
                    lambda q=queries, k=keys, v=values, m=additive: folded_attention(q, k, v, m), repeats, 10
                )
                if CUDA and nodes != 64:
                    line["by_splits_us"] = _by_splits(queries, keys, values, mask, repeats)
                lines.append(line)
                say(
                    "attention "
                    + " ".join(f"{k}={round(v, 1) if isinstance(v, float) else v}" for k, v in line.items())
                )
    return lines


def _by_splits(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask, repeats: int) -> dict[int, float]:
    from speculens import kernels  # noqa: PLC0415

    def run(splits: int) -> Tensor:
        return kernels.attend(queries, keys, values, mask.lengths, mask.newest, 128**-0.5, splits=splits)

    found = {}
    for splits in (1, 2, 4, 8, 16, 32):
        if splits * 64 <= keys.shape[2]:
            found[splits] = round(1e3 * clock(lambda splits=splits: run(splits), max(20, repeats // 3), 10), 1)
    return found


def _tree(nodes: int, vocabulary: int) -> DraftTree:
    parents = torch.tensor([[max(0, (i - 1) // 3) for i in range(nodes)]])
    depth = torch.zeros_like(parents)
    for node in range(1, nodes):
        depth[0, node] = depth[0, parents[0, node]] + 1
    tokens = torch.arange(nodes)[None] * 37 % vocabulary
    tensors = (part.to(DEVICE) for part in (tokens, parents, depth, torch.ones_like(parents, dtype=torch.bool)))
    return DraftTree.build(*tensors, levels=int(depth.max()))


# A whole pass


def _model(shape: Shape) -> Any:
    common = dict(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32768,
    )
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if shape.bias else (LlamaForCausalLM, LlamaConfig)
    with torch.device("meta"):
        model = kind._from_config(config(**common), attn_implementation=NAME, dtype=DTYPE)  # noqa: SLF001
    model.to_empty(device=DEVICE)
    for name, weight in model.named_parameters():
        weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(0, 0.02)
    rotary = model.model.rotary_emb  # its buffers are made by arithmetic, not loaded
    model.model.rotary_emb = type(rotary)(model.config).to(DEVICE)
    return model.eval().requires_grad_(False)


def time_decoder(name: str, shape: Shape, repeats: int) -> dict[str, Any]:
    """One pass over a node and over a tree, by Hugging Face's decoder and fused; then its parts."""
    model = _model(shape)
    decoder, head = model.model, model.lm_head
    dim = shape.hidden // shape.heads
    weights = sum(p.nbytes for p in decoder.layers.parameters()) + head.weight.nbytes
    bandwidth = _bandwidth(repeats)
    floor = weights / bandwidth / 1e6
    found: dict[str, Any] = {"weights_GB": weights / 1e9, "read_GBps": bandwidth, "floor_ms": floor}
    say(f"{name}: {weights / 1e9:.2f} GB of weights, read at {bandwidth:.0f} GB/s in {floor:.2f} ms")
    fused = FusedDecoder(decoder)
    hidden: dict[tuple[str, int], Tensor] = {}
    for nodes in (1, NODES):
        tree = _tree(nodes, shape.vocabulary)
        cache = _cache(1, BUCKET, shape.kv_heads, dim, shape.layers, DTYPE, [PREFIX], nodes)
        for block in cache._blocks.values():  # noqa: SLF001 - a prefix of random numbers instead of a prefill
            block[:, :PREFIX].normal_(0, 0.5)
        cache._columns = BUCKET  # noqa: SLF001 - as a recorded graph looks at its whole bucket
        past = cache.as_transformers()

        def theirs(tree: DraftTree = tree, cache: SlotCache = cache, past: Any = past) -> Tensor:
            mask = TreeMask(cache.lengths, tree.ancestors, tree.depth)
            stub = torch.zeros(1, 1, 1, 1, dtype=DTYPE, device=DEVICE)
            embeds = decoder.embed_tokens(tree.tokens)
            given = dict(position_ids=PREFIX + tree.depth, tree=mask, **cache_arguments(decoder, past))
            return decoder(inputs_embeds=embeds, attention_mask=stub, **given).last_hidden_state

        def ours(tree: DraftTree = tree, cache: SlotCache = cache) -> Tensor:
            mask = TreeMask(cache.lengths, tree.ancestors, tree.depth)
            attend = partial(tree_attention, mask=mask)
            return fused(decoder.embed_tokens(tree.tokens), PREFIX + tree.depth, cache, attend)

        for way, run in (("hf", theirs), ("fused", ours)):
            hidden[way, nodes] = run().clone()
            found[f"{way}_{nodes}_ms"] = clock(lambda run=run: head(run()), repeats)
            say(f"{name}: {way} pass over {nodes} nodes {found[f'{way}_{nodes}_ms']:.3f} ms")
        gap = (hidden["hf", nodes].double() - hidden["fused", nodes].double()).norm()
        found[f"relative_difference_{nodes}"] = float(gap / hidden["hf", nodes].double().norm())
        say(f"{name}: relative difference {found[f'relative_difference_{nodes}']:.1e}")
    found["tree_over_step"] = found[f"fused_{NODES}_ms"] / found["fused_1_ms"]
    say(f"{name}: tree / step {found['tree_over_step']:.3f}, step / floor {found['fused_1_ms'] / floor:.3f}")
    found["products"] = [
        line for nodes in (1, NODES) for line in _products(name, decoder.layers, head, fused, nodes, repeats)
    ]
    found["parts_us"] = {nodes: _parts(name, shape, decoder, nodes, repeats) for nodes in (1, NODES)}
    return found


def _bandwidth(repeats: int) -> float:
    """GB/s at which this device reads memory: a sum over 2 GB."""
    block = torch.zeros((1 << 29) if CUDA else (1 << 20), dtype=torch.float32, device=DEVICE)
    return block.nbytes / clock(block.sum, max(10, repeats // 3)) / 1e6


def _products(name: str, layers: Any, head: Any, fused: FusedDecoder, nodes: int, repeats: int) -> list[dict[str, Any]]:
    """Each matrix product over all layers in turn, so that no weight stays in a cache."""
    own = fused._layers  # noqa: SLF001
    stacks = {
        "qkv": [layer.qkv.weight for layer in own],
        "output": [layer.self_attn.o_proj.weight for layer in layers],
        "gate_up": [layer.gate_up.weight for layer in own],
        "down": [layer.mlp.down_proj.weight for layer in layers],
        "head": [head.weight],
    }
    lines = []
    for what, weights in stacks.items():
        x = torch.randn(1, nodes, weights[0].shape[1], device=DEVICE, dtype=DTYPE)

        def all_of(product: Callable[..., Tensor], x: Tensor = x, weights: list[Tensor] = weights, **tile: int) -> None:
            for weight in weights:
                product(x, weight, **tile)

        nbytes = weights[0].nbytes
        line: dict[str, Any] = {"what": what, "shape": list(weights[0].shape), "rows": nodes}
        line["cublas_us"] = 1e3 * clock(lambda run=all_of: run(F.linear), repeats) / len(weights)
        line["cublas_GBps"] = nbytes / line["cublas_us"] / 1e3
        if CUDA and nodes == 1:
            from speculens import kernels  # noqa: PLC0415

            line["triton_us"] = {}
            for n, k, warps in TILES:
                spent = clock(
                    lambda run=all_of, n=n, k=k, w=warps: run(kernels.linear_row, block_n=n, block_k=k, num_warps=w),
                    max(20, repeats // 3),
                )
                line["triton_us"][f"{n}x{k}x{warps}"] = round(1e3 * spent / len(weights), 2)
            best = min(line["triton_us"].values())
            line["triton_best_GBps"] = nbytes / best / 1e3
        lines.append(line)
        say(f"{name}: {json.dumps(line, default=lambda v: round(v, 1))}")
    return lines


def _parts(name: str, shape: Shape, decoder: Any, nodes: int, repeats: int) -> dict[str, float]:
    """The rest of a layer, microseconds each: kernels, and plain torch for comparison."""
    dim = shape.hidden // shape.heads
    cache = _cache(1, BUCKET, shape.kv_heads, dim, 1, DTYPE, [PREFIX], nodes)
    cache._columns = BUCKET  # noqa: SLF001
    tree = _tree(nodes, shape.vocabulary)
    mask = TreeMask(cache.lengths, tree.ancestors, tree.depth)
    stream = torch.randn(1, nodes, shape.hidden, device=DEVICE, dtype=DTYPE)
    update, gain = torch.randn_like(stream), torch.ones(shape.hidden, device=DEVICE, dtype=DTYPE)
    joined = torch.randn(1, nodes, (shape.heads + 2 * shape.kv_heads) * dim, device=DEVICE, dtype=DTYPE)
    gate_up = torch.randn(1, nodes, 2 * shape.mlp, device=DEVICE, dtype=DTYPE)
    cos, sin = decoder.rotary_emb(stream, PREFIX + tree.depth)
    queries, keys, values = ops.rotate_into(cache, 0, joined, cos, sin)
    runs = {
        "attention": lambda: tree_attention(queries, keys, values, mask),
        "add_norm": lambda: ops.add_norm(stream, update, gain, 1e-6),
        "rotate_into": lambda: ops.rotate_into(cache, 0, joined, cos, sin),
        "swiglu": lambda: ops.swiglu(gate_up),
    }
    found = {what: 1e3 * clock(run, repeats, 20) for what, run in runs.items()}
    found["rotary_emb once a pass"] = 1e3 * clock(lambda: decoder.rotary_emb(stream, PREFIX + tree.depth), repeats, 5)
    with plain_torch():
        for what in ("add_norm", "rotate_into", "swiglu"):
            found[f"{what} in plain torch"] = 1e3 * clock(runs[what], repeats, 20)
    say(f"{name}: N={nodes} " + ", ".join(f"{what} {us:.1f} us" for what, us in found.items()))
    return found


# Products of few rows


def time_few_rows(shapes: dict[str, Shape], repeats: int, *, int8: bool) -> dict[str, Any]:
    """The library's products against `linear_rows` by tile, microseconds of each, and milliseconds of all in a pass.

    int8  our weights in 8 bits; the library's are in 16 all the same
    """
    from speculens import kernels  # noqa: PLC0415 - there need not be Triton elsewhere

    tiles = [kernels.Tile(*sizes) for sizes in (INT8_TILES if int8 else ROW_TILES)]
    products = {name: _products_of(shape) for name, shape in shapes.items()}
    broken = _compile_tiles([size for own in products.values() for size in own.values()], tiles, int8=int8)
    say(f"compiled; {len(broken)} failed")
    lines, passes = [], {}
    for name, shape in shapes.items():
        own = [
            {"model": name, "what": what} | line
            for what, (outputs, inputs) in products[name].items()
            for line in _few_rows(outputs, inputs, tiles, broken, max(2, repeats // 2), int8=int8)
        ]
        lines += own
        passes[name] = {rows: _pass_by_tile(own, shape, rows) for rows in ROW_COUNTS}
        for rows, spent in passes[name].items():
            say(f"{name}: all products of a pass over {rows} rows, ms: {json.dumps(spent)}")
    return {"lines": lines, "pass_ms": passes, "failed": sorted(set(broken.values()))}


def _products_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a decoder's products, and of those that a drafter of its width has beside."""
    dim = shape.hidden // shape.heads
    found = {
        "qkv": ((shape.heads + 2 * shape.kv_heads) * dim, shape.hidden),
        "output": (shape.hidden, shape.heads * dim),
        "gate_up": (2 * shape.mlp, shape.hidden),
        "down": (shape.hidden, shape.mlp),
        "head": (shape.vocabulary, shape.hidden),
        "drafter's fusion": (shape.hidden, 2 * shape.hidden),
    }
    if shape.vocabulary > 32768:
        found["drafter's head"] = (32768, shape.hidden)
    return found


def _variant(rows: int, outputs: int, inputs: int, tile: Any) -> tuple[Any, ...]:
    """What Triton compiles anew for."""
    from speculens import kernels  # noqa: PLC0415

    processors = torch.cuda.get_device_properties(0).multi_processor_count if CUDA else 4
    parts = kernels.shares(outputs, inputs, tile, processors)[1]
    return kernels.padded_rows(rows), parts, inputs % tile.inputs == 0, tile


def _worthwhile(rows: int, tile: Any, *, int8: bool) -> bool:
    """Whether something is in flight while a step along K is worked on."""
    from speculens import kernels  # noqa: PLC0415

    x, weight = (torch.empty(0, device=DEVICE, dtype=dtype) for dtype in (DTYPE, torch.int8 if int8 else DTYPE))
    return kernels.stages(rows, tile, x, weight) >= 3


def _compile_tiles(sizes: list[tuple[int, int]], tiles: list[Any], *, int8: bool) -> dict[tuple[Any, ...], str]:
    """Fill Triton's cache on disk in processes of their own; the variants that failed, and why."""
    jobs = {
        _variant(rows, *size, tile): (rows, *size, tile, int8)
        for tile in tiles
        for size in sizes
        for rows in ROW_COUNTS
        if _worthwhile(rows, tile, int8=int8)
    }
    say(f"{len(jobs)} variants to compile")
    with ProcessPoolExecutor(14 if CUDA else 1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        errors = pool.map(_run_tile, jobs.values())
        return {variant: f"{variant}: {error}" for variant, error in zip(jobs, errors, strict=True) if error}


def _run_tile(job: tuple[int, int, int, Any, bool]) -> str | None:
    """Compile and launch once; why that failed."""
    from speculens import kernels  # noqa: PLC0415

    rows, outputs, inputs, tile, int8 = job
    try:
        x, weight = (torch.zeros(lines, inputs, device=DEVICE, dtype=DTYPE) for lines in (rows, outputs))
        weight, scales = press(weight) if int8 else (weight, None)
        kernels.linear_rows(x, weight, scales=scales, tile=tile)
        if CUDA:
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - not every error of a compiler can be sent to another process
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _few_rows(
    outputs: int, inputs: int, tiles: list[Any], broken: dict[tuple[Any, ...], str], repeats: int, *, int8: bool
) -> list[dict[str, Any]]:
    """One product; as many copies of its weight in turn as no cache holds."""
    copies = -(-400_000_000 // (outputs * inputs * (1 if int8 else 2))) if CUDA else 1
    weights = torch.randn(copies, outputs, inputs, device=DEVICE, dtype=DTYPE).mul_(inputs**-0.5)
    ours: list[Any] = [press(weight) if int8 else (weight, None) for weight in weights]
    numbers, scales = ours[0]
    exact = numbers.double() if scales is None else numbers.double() * scales
    lines = []
    for rows in ROW_COUNTS:
        x = torch.randn(1, rows, inputs, device=DEVICE, dtype=DTYPE)
        want = x.double() @ exact.T

        def spent(product: Callable[..., Tensor], weights: Any, x: Tensor = x) -> float:
            return round(1e3 * clock(lambda: [product(x, *weight) for weight in weights], repeats) / copies, 2)

        line: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "rows": rows}
        line["cublas_us"] = spent(F.linear, [(weight,) for weight in weights])
        line["tiles_us"], line["wrong"] = {}, {}
        for tile in tiles:
            label = "x".join(map(str, tile))
            if not _worthwhile(rows, tile, int8=int8) or _variant(rows, outputs, inputs, tile) in broken:
                continue
            product = partial(_rows_product, tile=tile)
            try:
                got = product(x, *ours[0]).clone()
                gap = float((got.double() - want).abs().max() / want.abs().max())
                if not gap < 2e-2:
                    line["wrong"][label] = gap
                line["tiles_us"][label] = spent(product, ours)
                if not got.equal(product(x, *ours[0])):
                    line["wrong"][label] = f"{gap:.1e}, and not the same again"
            except Exception as error:  # noqa: BLE001 - the other tiles still count
                line["wrong"][label] = str(error)[:200]
        lines.append(line)
        gigabytes = outputs * inputs * numbers.element_size() / 1e3
        best = sorted(line["tiles_us"].items(), key=lambda pair: pair[1])[:3]
        say(
            f"{outputs:6d} x {inputs:5d}, {rows:2d} rows: cuBLAS {line['cublas_us']:6.1f} us "
            f"({gigabytes / line['cublas_us']:4.0f} GB/s), ours "
            + ", ".join(f"{label} {us:6.1f} ({gigabytes / us:4.0f})" for label, us in best)
            + (f"  <-- WRONG {line['wrong']}" if line["wrong"] else "")
        )
    return lines


def _rows_product(x: Tensor, weight: Tensor, scales: Tensor | None, tile: Any) -> Tensor:
    from speculens import kernels  # noqa: PLC0415

    return kernels.linear_rows(x, weight, scales=scales, tile=tile)


def _pass_by_tile(lines: list[dict[str, Any]], shape: Shape, rows: int) -> dict[str, float]:
    """Milliseconds of a decoder's products in a pass: by cuBLAS, each tile that can do all, and the best for each."""
    times = {"cuBLAS": 0.0, "best of each": 0.0}
    own = [line for line in lines if line["rows"] == rows and "drafter" not in line["what"]]
    for line in own:
        many = 1 if line["what"] == "head" else shape.layers
        for tile, us in {"cuBLAS": line["cublas_us"]}.items() | line["tiles_us"].items():
            times[tile] = times.get(tile, 0) + many * us / 1e3
        times["best of each"] += many * min([line["cublas_us"], *line["tiles_us"].values()]) / 1e3
    complete = {tile for tile in times if all(tile in line["tiles_us"] for line in own)} | {"cuBLAS", "best of each"}
    return {tile: round(ms, 3) for tile, ms in sorted(times.items(), key=lambda pair: pair[1]) if tile in complete}


if __name__ == "__main__":
    main()
