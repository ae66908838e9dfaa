"""Triton kernels behind `ops.py` and `attention.py`, where each is defined in plain torch. Needs Triton to be imported.

A pass over one node or a small tree reads every weight once and does little else, so time is bytes moved and gaps
between kernels. These kernels join what plain torch does in several: fewer launches, no copies, and attention whose
work follows the true length of a slot rather than the bucket it lies in. All read lengths on the device and allocate
only their results, so they may be captured in a CUDA graph. Tensors are contiguous in their last dimension.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import count
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


def try_out(device: torch.device) -> None:
    """Compile and run a small kernel."""
    swiglu(torch.zeros(1, 2, device=device))


def add_norm(stream: Tensor, update: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_norm`: one program a row."""
    size = stream.shape[-1]
    stream = stream.contiguous()
    added = stream if update is None else torch.empty_like(stream)
    normed = torch.empty_like(stream)
    block = triton.next_power_of_2(size)
    with _on(stream):
        _add_norm[(stream.numel() // size,)](
            stream, stream if update is None else update, gain, added, normed, size, eps,
            ADD=update is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return added, normed


@triton.jit
def _add_norm(stream, update, gain, added, normed, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(stream + start + at, mask=inside, other=0)
    if ADD:
        value = value + tl.load(update + start + at, mask=inside, other=0)
        tl.store(added + start + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    narrow = (wide * scale).to(value.dtype)
    tl.store(normed + start + at, narrow * tl.load(gain + at, mask=inside, other=0), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """`ops.swiglu`."""
    inner = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], inner)
    block = 1024
    with _on(gate_up):
        _swiglu[(out.numel() // inner, triton.cdiv(inner, block))](gate_up, out, inner, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _swiglu(gate_up, out, inner, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0)
    wide = gate.to(tl.float32)
    active = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * inner + at, active * up, mask=inside)


def rotate_into(
    joined: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    start: int,
    gains: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """`ops.rotate_into` from columns `lengths + start` on: one program a row and head; queries are rotated in place."""
    batch, nodes, width = joined.shape
    kv_heads, columns, dim = keys.shape[1:]
    heads = width // dim - 2 * kv_heads
    query_gain, key_gain, eps = gains or (joined, joined, 0.0)
    cos, sin = cos.expand(batch, nodes, dim).contiguous(), sin.expand(batch, nodes, dim).contiguous()
    with _on(joined):
        _rotate_into[(batch * nodes, heads + 2 * kv_heads)](
            joined, cos, sin, keys, values, lengths, start, query_gain, key_gain,
            *keys.stride()[:3], *values.stride()[:3], nodes, heads, kv_heads, columns, eps,
            DIM=dim, BLOCK=triton.next_power_of_2(dim // 2), NORM=gains is not None, num_warps=1,
        )  # fmt: skip
    return joined.view(batch, nodes, -1, dim)[:, :, :heads].transpose(1, 2)


@triton.jit(do_not_specialize=["start"])  # one program for all levels of a tree
def _rotate_into(
    joined, cos, sin, keys, values, lengths, start, query_gain, key_gain,
    key_slot, key_head, key_column, value_slot, value_head, value_column, nodes, heads, kv_heads, columns, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = row // nodes
    column = tl.load(lengths + slot).to(tl.int64) + start + row % nodes
    half: tl.constexpr = DIM // 2
    at = tl.arange(0, BLOCK)
    inside = at < half
    source = joined + (row * (heads + 2 * kv_heads) + head) * DIM
    first = tl.load(source + at, mask=inside, other=0)
    second = tl.load(source + half + at, mask=inside, other=0)
    room = inside & (column < columns)
    if head >= heads + kv_heads:
        target = values + slot * value_slot + (head - heads - kv_heads) * value_head + column * value_column
        tl.store(target + at, first, mask=room)
        tl.store(target + half + at, second, mask=room)
    else:
        if NORM:
            gain = query_gain if head < heads else key_gain
            left, right = first.to(tl.float32), second.to(tl.float32)
            scale = tl.rsqrt((tl.sum(left * left, 0) + tl.sum(right * right, 0)) / DIM + eps)
            first = (left * scale).to(first.dtype) * tl.load(gain + at, mask=inside, other=0)
            second = (right * scale).to(second.dtype) * tl.load(gain + half + at, mask=inside, other=0)
        left, right = first.to(tl.float32), second.to(tl.float32)
        turn = row * DIM + at
        upper = left * tl.load(cos + turn, mask=inside, other=0).to(tl.float32)
        upper -= right * tl.load(sin + turn, mask=inside, other=0).to(tl.float32)
        lower = right * tl.load(cos + turn + half, mask=inside, other=0).to(tl.float32)
        lower += left * tl.load(sin + turn + half, mask=inside, other=0).to(tl.float32)
        if head < heads:
            tl.store(source + at, upper.to(first.dtype), mask=inside)
            tl.store(source + half + at, lower.to(first.dtype), mask=inside)
        else:
            target = keys + slot * key_slot + (head - heads) * key_head + column * key_column
            tl.store(target + at, upper.to(first.dtype), mask=room)
            tl.store(target + half + at, lower.to(first.dtype), mask=room)


def linear_row(
    row: Tensor, weight: Tensor, bias: Tensor | None = None, *, block_n: int = 8, block_k: int = 512, num_warps: int = 4
) -> Tensor:
    """`F.linear` of a single row (..., K) with all leading dimensions 1: streams the weight (N, K) once.

    The default tile was within 6 % of the best one for each product of two 7Bs' layers and heads on an H200
    (`benchmarks/target_pass.py`).
    """
    outputs, inputs = weight.shape
    out = row.new_empty(*row.shape[:-1], outputs)
    with _on(row):
        _linear_row[(triton.cdiv(outputs, block_n),)](
            row.contiguous(), weight, bias, out, outputs, inputs, weight.stride(0),
            BIAS=bias is not None, EVEN=inputs % block_k == 0, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps,
        )  # fmt: skip
    return out


@triton.jit
def _linear_row(
    row, weight, bias, out, outputs, inputs, stride,
    BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * stride
    at = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, inputs, BLOCK_K):
        if EVEN:
            x = tl.load(row + k + at)
            w = tl.load(lines + (k + at)[None, :], eviction_policy="evict_first")
        else:
            inside = k + at < inputs
            x = tl.load(row + k + at, mask=inside, other=0)
            w = tl.load(lines + (k + at)[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < outputs)


class Tile(NamedTuple):
    """How `linear_rows` cuts its work: a program takes `outputs` rows of the weight, `inputs` columns at a time."""

    outputs: int
    inputs: int
    warps: int
    programs: int  # that share a processor; each has as many columns in flight as fit its part of the shared memory


# Of those measured on an H200 (docs/benchmarks.md), for weights of no more tiles than processors, and for others.
TILES = Tile(64, 256, 4, 1), Tile(64, 128, 4, 2)
INT8_TILES = Tile(64, 256, 4, 2), Tile(128, 128, 8, 2)
MOST_ROWS = 64  # of one launch
HALF = tl.constexpr(128)
HALVED_AT_ONCE = 1024  # numbers of a row
STREAMS = 64  # that can count arrivals at the same time
_streams = count()


def linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """`ops.linear` of several rows (..., K): streams the weight (N, K) once for each 64 of them.

    A weight in 8 bits is multiplied as it is, by the rows as two whole numbers of 8 bits each (`_halved`): turning it
    into numbers of 16 bits first would take as long as reading those.

    Weight and rows change places, so that the weight fills the long side of the tensor cores. Programs that would run
    alone at the end, or leave processors idle from the start, are split along K: each part leaves its sums, and who
    comes last adds them up, always in the same order. The counters for that belong to a stream, as a library's
    workspace does: graphs recorded on one stream may not be replayed at the same time.
    """
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if rows > MOST_ROWS:
        pieces = x.reshape(rows, inputs).split(MOST_ROWS)
        products = [linear_rows(each, weight, bias, scales, tile=tile) for each in pieces]
        return torch.cat(products).view(*x.shape[:-1], outputs)
    block_m = padded_rows(rows)
    processors = _processors(x.device)
    tile = tile or _tile(outputs, processors, weight.dtype)
    whole, splits, share = shares(outputs, inputs, tile, processors)
    parts = (triton.cdiv(outputs, tile.outputs) - whole) * splits
    out = x.new_empty(*x.shape[:-1], outputs)
    partial = x.new_empty(parts * tile.outputs * block_m, dtype=torch.float32)
    with _on(x):
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        states, steps = (x.contiguous(), None) if scales is None else _halved(x.reshape(rows, inputs))
        _linear_rows[(whole + parts,)](
            states, steps, weight, scales, bias, out, partial, _arrivals(x.device, stream),
            rows, outputs, inputs, weight.stride(0), whole, share,
            BIAS=bias is not None, INT8=scales is not None, EVEN=inputs % tile.inputs == 0, SPLITS=splits,
            BLOCK_M=block_m, BLOCK_N=tile.outputs, BLOCK_K=tile.inputs,
            num_warps=tile.warps, num_stages=max(1, stages(rows, tile, x, weight)),
        )  # fmt: skip
    return out


def padded_rows(rows: int) -> int:
    """Rows of a tile: a power of two, for the tensor cores."""
    return max(16, triton.next_power_of_2(rows))


def _tile(outputs: int, processors: int, dtype: torch.dtype) -> Tile:
    narrow, wide = INT8_TILES if dtype == torch.int8 else TILES
    return narrow if outputs <= narrow.outputs * processors else wide


def stages(rows: int, tile: Tile, x: Tensor, weight: Tensor) -> int:
    """How many steps along K lie in the shared memory at once, at most 8: what keeps the memory busy is in flight."""
    room = _shared_memory(x.device) // tile.programs - 1024  # the driver keeps a kilobyte of each program's part
    column = tile.outputs * weight.element_size() + padded_rows(rows) * x.element_size()
    return min(8, room // (column * tile.inputs))


def shares(outputs: int, inputs: int, tile: Tile, processors: int) -> tuple[int, int, int]:
    """Tiles done whole, in how many parts each of the others is, and the columns of a part."""
    tiles, slots = triton.cdiv(outputs, tile.outputs), processors * tile.programs
    rest = tiles % slots  # beside as many as fill the device, which are best left whole
    blocks = triton.cdiv(inputs, tile.inputs)
    splits = min(slots // rest, 8, blocks) if rest else 1
    share = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, share)  # rounded up, a share may leave nothing for the last
    return tiles if splits == 1 else tiles - rest, splits, share * tile.inputs


@triton.jit(do_not_specialize=["rows", "whole"])
def _linear_rows(
    x, steps, weight, scales, bias, out, partial, arrived, rows, outputs, inputs, stride, whole, share,
    BIAS: tl.constexpr, INT8: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile, part, begin, end = program, 0, 0, inputs
    if program >= whole:
        tile = whole + (program - whole) // SPLITS
        part = (program - whole) % SPLITS
        begin = part * share
        end = tl.minimum(begin + share, inputs)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    at = tl.arange(0, BLOCK_K)
    lines = weight + tl.minimum(n, outputs - 1).to(tl.int64)[:, None] * stride + at[None, :]
    states = x + tl.minimum(m, rows - 1)[None, :] * inputs + at[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if INT8 else tl.float32)
    rest = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for k in range(begin, end, BLOCK_K):
        inside = k + at < inputs
        w = tl.load(lines + k) if EVEN else tl.load(lines + k, mask=inside[None, :], other=0)
        v = tl.load(states + k) if EVEN else tl.load(states + k, mask=inside[:, None], other=0)
        if INT8:
            low = states + rows * inputs + k
            u = tl.load(low) if EVEN else tl.load(low, mask=inside[:, None], other=0)
            total = tl.dot(w, v, acc=total, out_dtype=tl.int32)
            rest = tl.dot(w, u, acc=rest, out_dtype=tl.int32)
        else:
            total = tl.dot(w, v, acc=total, input_precision="ieee")
    if INT8:
        total = total.to(tl.float32) * HALF + rest.to(tl.float32)
        total *= (
            tl.load(scales + tl.minimum(n, outputs - 1))[:, None] * tl.load(steps + tl.minimum(m, rows - 1))[None, :]
        )
    if program < whole:
        _store_product(total, bias, out, m, n, rows, outputs, BIAS)
    else:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        place = partial + (program - whole - part) * size + m[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        tl.store(place + part * size, total, cache_modifier=".cg")
        tl.debug_barrier()  # all of this program's sums are stored before it is counted as arrived
        if tl.atomic_add(arrived + tile - whole, 1, sem="acq_rel") == SPLITS - 1:
            joined = tl.load(place, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                joined += tl.load(place + other * size, cache_modifier=".cg")
            _store_product(joined, bias, out, m, n, rows, outputs, BIAS)
            tl.store(arrived + tile - whole, 0)  # for the next launch


@triton.jit
def _store_product(total, bias, out, m, n, rows, outputs, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)[:, None]
    target = out + m[None, :] * outputs + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outputs)[:, None])


def _halved(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, K) as whole numbers (2, n, K) int8 and steps (n,) float32: x = step (128 * first + second).

    A step is one 16,256th of the largest number of its row, which bfloat16 itself rounds to one 256th.
    """
    rows, size = x.shape
    parts = torch.empty(2, rows, size, dtype=torch.int8, device=x.device)
    steps = torch.empty(rows, dtype=torch.float32, device=x.device)
    whole = triton.next_power_of_2(size)
    _halve[rows, triton.cdiv(size, HALVED_AT_ONCE)](
        x.contiguous(), parts, steps, rows, size,
        WHOLE=whole, BLOCK=HALVED_AT_ONCE, num_warps=min(8, max(1, whole // 1024)),
    )  # fmt: skip
    return parts, steps


@triton.jit(do_not_specialize=["rows"])
def _halve(x, parts, steps, rows, size, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Each program looks at the whole row, which is soon done, and halves its part: dividing and rounding take long."""
    row = tl.program_id(0)
    whole = tl.arange(0, WHOLE)
    all_of_it = tl.load(x + row * size + whole, mask=whole < size, other=0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(all_of_it), 0), 1e-30) / (127 * HALF)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    number = tl.floor(tl.load(x + row * size + at, mask=inside, other=0).to(tl.float32) / step + 0.5)
    high = tl.floor(number / HALF + 0.5)
    tl.store(parts + row * size + at, high.to(tl.int8), mask=inside)
    tl.store(parts + (rows + row) * size + at, (number - high * HALF).to(tl.int8), mask=inside)
    tl.store(steps + row, step)


@cache
def _arrivals(device: torch.device, stream: int) -> Tensor:  # noqa: ARG001 - each stream has its own
    """Zeros, one for each tile in parts: there are fewer of those than programs fit the device."""
    return _all_arrivals(device)[next(_streams) % STREAMS]


@cache
def _all_arrivals(device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Recorded, the zeros would be written when this graph is replayed, and another one may come first.
        raise RuntimeError("the first product of few rows on a device cannot be recorded: run it once before")
    zeros = torch.zeros(STREAMS, 32 * _processors(device), dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # whichever stream counts first finds them written
    return zeros


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    newest: Tensor,
    scale: float,
    *,
    depth: Tensor | None = None,
    window: int | None = None,
    splits: int | None = None,
) -> Tensor:
    """`attention.tree_attention`: columns split over programs, partial results merged by their log-sum-exp.

    The columns that exist are shared out evenly among `splits`, whatever the bucket. The result (B, heads, N, d) lies
    in memory as (B, N, heads, d).
    """
    batch, heads, nodes, dim = queries.shape
    kv_heads, columns = keys.shape[1:3]
    width = newest.shape[2]
    rows = heads // kv_heads * nodes
    block_d = max(16, triton.next_power_of_2(dim))
    wide = queries.element_size() == 4  # float32 has no tensor cores here: small tiles, or registers spill
    block_m = min(16 if wide else 64, max(16, triton.next_power_of_2(rows)))
    block_s = 64 if queries.element_size() * block_d <= 256 else 32
    grid = triton.cdiv(rows, block_m), batch * kv_heads
    if splits is None:
        # As many as fill the device twice: two programs run on a processor, and a third would wait for them. At most
        # 32: where 66 fitted, 8,192 columns took twice as long, probably because one warp merges all of a row.
        twice = 2 * _processors(queries.device) // (grid[0] * grid[1])
        splits = max(1, min(triton.cdiv(columns, block_s), twice, 32))
    out = queries.new_empty(batch, nodes, heads, dim)
    partial = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    weight = out.new_empty(splits, batch, nodes, heads, dtype=torch.float32)
    seen = newest.view(torch.uint8)
    depth = lengths[:, None] if depth is None else depth
    with _on(queries):
        _attend[(*grid, splits)](
            queries, keys, values, lengths, seen, depth, partial, weight,
            *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *seen.stride(), *depth.stride(),
            scale * LOG2E, batch, heads, kv_heads, nodes, width, columns, window or 0,
            DIM=dim, WINDOW=window is not None, BLOCK_M=block_m, BLOCK_S=block_s, BLOCK_D=block_d,
            num_warps=8 if wide else 4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _merge[(batch * nodes * heads,)](
                partial, weight, out, batch * nodes * heads, splits,
                DIM=dim, BLOCK_D=block_d, SPLITS=triton.next_power_of_2(splits), num_warps=1,
            )  # fmt: skip
    return out.transpose(1, 2)


@triton.jit
def _attend(
    queries, keys, values, lengths, seen, depth, partial, weight,
    query_slot, query_head, query_row, key_slot, key_head, key_column, value_slot, value_head, value_column,
    seen_slot, seen_row, seen_column, depth_slot, depth_node,
    scale, batch, heads, kv_heads, nodes, width, columns, window,
    DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads
    split, splits = tl.program_id(2), tl.num_programs(2)

    # Rows of this program: (query head of the group, node), nodes fastest.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < heads // kv_heads * nodes
    head = kv_head * (heads // kv_heads) + row // nodes
    node = row % nodes
    dim = tl.arange(0, BLOCK_D)
    query = queries + slot * query_slot + head[:, None] * query_head + node[:, None] * query_row + dim[None, :]
    q = tl.load(query, mask=real[:, None] & (dim < DIM)[None, :], other=0)

    # Columns of this program: an even share of those that exist, and that any node can see.
    length = tl.load(lengths + slot).to(tl.int32)
    total = tl.minimum(length + width, columns)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - window + 1, 0)
        own_depth = tl.load(depth + slot * depth_slot + node * depth_node, mask=real, other=0).to(tl.int32)
    share = tl.cdiv(tl.cdiv(total - begin, splits), BLOCK_S) * BLOCK_S
    begin += split * share
    end = tl.minimum(begin + share, total)
    plain = begin  # up to here, blocks lie in the prefix and every row sees all of them
    if not WINDOW:
        plain += tl.maximum(tl.minimum(end, length) - begin, 0) // BLOCK_S * BLOCK_S

    at = tl.arange(0, BLOCK_S)
    key = keys + slot * key_slot + kv_head * key_head + dim[:, None]
    value = values + slot * value_slot + kv_head * value_head + dim[None, :]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for c in range(begin, plain, BLOCK_S):
        k = tl.load(key + (c + at)[None, :] * key_column, mask=(dim < DIM)[:, None], other=0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        v = tl.load(value + (c + at)[:, None] * value_column, mask=(dim < DIM)[None, :], other=0)
        top, mass, mixed = _absorb(scores, v, top, mass, mixed)
    for c in range(plain, end, BLOCK_S):
        column = c + at
        inside = column < end
        offset = column - length
        drafted = inside & (offset >= 0)
        line = seen + slot * seen_slot + node[:, None] * seen_row + offset[None, :] * seen_column
        visible = tl.load(line, mask=real[:, None] & drafted[None, :], other=0) != 0
        visible = visible | (inside & (offset < 0))[None, :]
        if WINDOW:
            drafted_depth = tl.load(depth + slot * depth_slot + offset * depth_node, mask=drafted, other=0)
            their_depth = tl.where(offset < 0, offset, drafted_depth.to(tl.int32))
            visible = visible & (own_depth[:, None] - their_depth[None, :] < window)
        k = tl.load(key + column[None, :] * key_column, mask=(dim < DIM)[:, None] & inside[None, :], other=0)
        scores = tl.where(visible, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        v = tl.load(value + column[:, None] * value_column, mask=(dim < DIM)[None, :] & inside[:, None], other=0)
        top, mass, mixed = _absorb(scores, v, top, mass, mixed)

    # A row that sees nothing here has weight exp(-inf) = 0 in the merge, and zeros rather than 0 / 0.
    mass = tl.where(mass > 0, mass, 1)
    mixed = mixed / mass[:, None]
    place = (slot * nodes + node) * heads + head
    place += split.to(tl.int64) * batch * nodes * heads
    out = partial + place[:, None] * DIM + dim[None, :]
    tl.store(out, mixed.to(partial.dtype.element_ty), mask=real[:, None] & (dim < DIM)[None, :])
    tl.store(weight + place, top + tl.log2(mass), mask=real)


@triton.jit
def _absorb(scores, v, top, mass, mixed):
    """One block of columns into a running softmax (base 2) of each row."""
    higher = tl.maximum(top, tl.max(scores, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # no column seen yet: -inf - -inf is no number
    share = tl.exp2(scores - level[:, None])
    fade = tl.exp2(top - level)
    mass = mass * fade + tl.sum(share, 1)
    mixed = tl.dot(share.to(v.dtype), v, acc=mixed * fade[:, None], input_precision="ieee")
    return higher, mass, mixed


@triton.jit
def _merge(partial, weight, out, rows, splits, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * rows + row
    held = split < splits
    weights = tl.load(weight + place, mask=held, other=float("-inf"))
    top = tl.max(weights, 0)
    shares = tl.exp2(weights - tl.where(top == float("-inf"), 0.0, top))
    mixed = tl.load(partial + place[:, None] * DIM + dim[None, :], mask=held[:, None] & (dim < DIM)[None, :], other=0)
    mass = tl.sum(shares, 0)
    merged = tl.sum(mixed * shares[:, None], 0) / tl.where(mass > 0, mass, 1)
    tl.store(out + row * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 228 << 10
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
