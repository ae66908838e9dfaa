"""Triton kernels behind `drafters/grow.py` and `tree.py`, where each is defined in plain torch. Needs Triton.

A tree's numbers are few, so plain torch spends its time on launches: some forty a level. Here a step of growth is one
launch, and so is what follows the last. No result is bit-equal to torch's where numbers are equal or are none: another
tree is drafted then, which may change how long a step's path is, never what it says. But whatever the numbers are, a
node's children are different tokens within the vocabulary, and parents come before their children.

Numbers are ranked by a key that no two of them share. Nothing here waits for a comparison to come true, so numbers that
are none cannot hang it. All may be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speculens.kernels import _on

LOWEST = tl.constexpr(-(2**63))  # the key of what is not there
LAST = tl.constexpr(2**31 - 1)


def try_out(device: torch.device) -> None:
    """Compile and run each kernel, and see that a root's two children are found and one followed; else RuntimeError.

    What is accepted depends on these kernels, so one that is built wrong must not go unnoticed.
    """
    logits = torch.zeros(1, 1, 5000, device=device)
    logits[..., 4001], logits[..., 7] = 3, 2
    scores, tokens = likeliest(logits, 2, None)
    zeros, reach = tokens.new_zeros(1, 3), scores.new_zeros(1, 3)
    created = zeros.clone(), reach, zeros.clone(), zeros.clone()
    none = torch.zeros(1, 1, 0, dtype=torch.bool, device=device)
    extend(created, scores[..., 0], zeros[:, :1], none, scores, scores, tokens, 1, 1)
    tree = best(*created, 3, 1)
    path, counts = follow(*tree, tokens.flip(2).expand(1, 3, 2)[..., 1].contiguous(), 2)
    found = [tree[0].tolist(), tree[1].tolist(), path.tolist(), counts.tolist()]
    if found != [[[0, 4001, 7]], [[0, 0, 0]], [[0, 1]], [2]]:
        raise RuntimeError(f"a tree of three nodes came out as {found}")


def likeliest(logits: Tensor, count: int, ids: Tensor | None, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """`grow.likeliest`: one program for each row and block of columns, then one a row that merges them."""
    size = logits.shape[-1]
    rows = logits.reshape(-1, size)
    blocks, lanes = triton.cdiv(size, block), triton.next_power_of_2(count)
    found = triton.next_power_of_2(blocks * count)
    keys = rows.new_empty(len(rows), blocks, count, dtype=torch.int64)
    tops, masses = rows.new_empty(2, len(rows), blocks, dtype=torch.float32)
    scores = rows.new_empty(*logits.shape[:-1], count, dtype=torch.float32)
    tokens = torch.empty_like(scores, dtype=torch.int64)
    with _on(logits):
        _likeliest_of_block[(len(rows), blocks)](
            rows, keys, tops, masses, rows.stride(0), size,
            COUNT=count, LANES=lanes, BLOCK=block, num_warps=4,
        )  # fmt: skip
        _likeliest_of_row[(len(rows),)](
            keys, tops, masses, tokens if ids is None else ids, scores, tokens, blocks,
            IDS=ids is not None, COUNT=count, LANES=lanes, FOUND=found, BLOCKS=triton.next_power_of_2(blocks),
            num_warps=min(8, max(1, found // 256)),
        )  # fmt: skip
    return scores, tokens


@triton.jit
def _likeliest_of_block(
    logits, keys, tops, masses, stride, size, COUNT: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + block
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    mass = tl.sum(tl.exp(value - _finite(top)), 0)
    tl.store(tops + place, top)
    tl.store(masses + place, mass)
    chosen = _largest(tl.where(inside, _key(value, column), LOWEST), COUNT, LANES)
    lane = tl.arange(0, LANES)
    tl.store(keys + place * COUNT + lane, chosen, mask=lane < COUNT)


@triton.jit
def _likeliest_of_row(
    keys, tops, masses, ids, scores, tokens, blocks,
    IDS: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, FOUND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    top = tl.load(tops + row * blocks + block, mask=block < blocks, other=float("-inf"))
    mass = tl.load(masses + row * blocks + block, mask=block < blocks, other=0)
    level = _finite(tl.max(top, 0))
    total = level + tl.log(tl.sum(mass * tl.exp(top - level), 0))

    at = tl.arange(0, FOUND)
    chosen = _largest(tl.load(keys + row * blocks * COUNT + at, mask=at < blocks * COUNT, other=LOWEST), COUNT, LANES)
    lane = tl.arange(0, LANES)
    real = lane < COUNT
    token = _index(chosen).to(tl.int64)
    if IDS:
        token = tl.load(ids + token, mask=real, other=0)
    tl.store(scores + row * COUNT + lane, _value(chosen) - total, mask=real)
    tl.store(tokens + row * COUNT + lane, token, mask=real)


def extend(
    created: tuple[Tensor, Tensor, Tensor, Tensor],
    scores: Tensor,
    nodes: Tensor,
    lineage: Tensor,
    hidden: Tensor,
    gains: Tensor,
    drafted: Tensor,
    first: int,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grow.extend`: every program chooses the next beam anew, then takes its share of the hidden columns along."""
    batch, beam, count = gains.shape
    size, columns = hidden.shape[2], lineage.shape[2]
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    next_scores = gains.new_empty(batch, count, dtype=torch.float32)
    next_tokens, next_nodes = drafted.new_empty(2, batch, count)
    next_lineage = lineage.new_empty(batch, count, columns + count)
    next_hidden = hidden.new_empty(batch, count, size)
    lanes, children = triton.next_power_of_2(count), triton.next_power_of_2(beam * count)
    share = min(2048 // lanes, triton.next_power_of_2(size))
    with _on(gains):
        _extend[(batch, triton.cdiv(size, share))](
            *created, scores, nodes, lineage.contiguous().view(torch.uint8), hidden,
            gains.contiguous(), drafted.contiguous(),
            next_scores, next_tokens, next_nodes, next_lineage.view(torch.uint8), next_hidden,
            created[0].stride(0), scores.stride(0), nodes.stride(0), hidden.stride(0), hidden.stride(1),
            beam, columns, size, first, depth,
            COUNT=count, LANES=lanes, CHILDREN=children, SHARE=share,
            num_warps=4 if count > 16 else 2,
        )  # fmt: skip
    return next_scores, next_tokens, next_nodes, next_lineage, next_hidden


@triton.jit(do_not_specialize=["columns", "first", "depth"])
def _extend(
    all_tokens, all_scores, all_parents, all_depth, scores, nodes, lineage, hidden, gains, drafted,
    next_scores, next_tokens, next_nodes, next_lineage, next_hidden,
    all_slot, scores_slot, nodes_slot, hidden_slot, hidden_row, beam, columns, size, first, depth,
    COUNT: tl.constexpr, LANES: tl.constexpr, CHILDREN: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    slot, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    child = tl.arange(0, CHILDREN)
    real = child < beam * COUNT
    above = child // COUNT
    gain = tl.load(gains + slot * beam * COUNT + child, mask=real, other=0).to(tl.float32)
    reach = tl.load(scores + slot * scores_slot + above, mask=real, other=0) + gain
    chosen = _largest(tl.where(real, _key(reach, child), LOWEST), COUNT, LANES)
    lane = tl.arange(0, LANES)
    taken = lane < COUNT
    best = _index(chosen)
    parent = best // COUNT

    column = part * SHARE + tl.arange(0, SHARE)
    inside = taken[:, None] & (column < size)[None, :]
    row = hidden + slot * hidden_slot + parent[:, None] * hidden_row + column[None, :]
    place = (slot * COUNT + lane).to(tl.int64)
    tl.store(next_hidden + place[:, None] * size + column[None, :], tl.load(row, mask=inside), mask=inside)
    if part == 0:
        entry = slot * all_slot + first + child
        tl.store(all_tokens + entry, tl.load(drafted + slot * beam * COUNT + child, mask=real), mask=real)
        tl.store(all_scores + entry, reach, mask=real)
        tl.store(all_parents + entry, tl.load(nodes + slot * nodes_slot + above, mask=real), mask=real)
        tl.store(all_depth + entry, tl.zeros((CHILDREN,), tl.int64) + depth, mask=real)

        tl.store(next_scores + place, _value(chosen), mask=taken)
        tl.store(next_tokens + place, tl.load(drafted + slot * beam * COUNT + best, mask=taken), mask=taken)
        tl.store(next_nodes + place, (best + first).to(tl.int64), mask=taken)
        width = columns + COUNT
        for start in range(0, width, 64):
            old = start + tl.arange(0, 64)
            kept = taken[:, None] & (old < columns)[None, :]
            line = lineage + (slot * beam + parent[:, None]) * columns + old[None, :]
            own = (old[None, :] - columns == lane[:, None]).to(tl.uint8)
            room = taken[:, None] & (old < width)[None, :]
            seen = tl.load(line, mask=kept, other=0) | own
            tl.store(next_lineage + place[:, None] * width + old[None, :], seen, mask=room)


def best(
    tokens: Tensor, scores: Tensor, parents: Tensor, depth: Tensor, nodes: int, levels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grow.best`: one program a slot ranks what was created, numbers what it keeps, and follows parents upward."""
    batch, total = tokens.shape
    kept_tokens, kept_parents, kept_depth = tokens.new_empty(3, batch, nodes)
    live = torch.empty_like(kept_tokens, dtype=torch.bool)
    ancestors = live.new_empty(batch, nodes, nodes)
    place = tokens.new_empty(batch, total, dtype=torch.int32)
    width = triton.next_power_of_2(nodes)
    with _on(tokens):
        _best[(batch,)](
            tokens, scores, parents, depth, place,
            kept_tokens, kept_parents, kept_depth, live.view(torch.uint8), ancestors.view(torch.uint8),
            tokens.stride(0), total, nodes, levels,
            SPAN=triton.next_power_of_2(total), TILE=32, WIDTH=width, ROWS=_rows_at_once(width),
            num_warps=4,
        )  # fmt: skip
    return kept_tokens, kept_parents, kept_depth, live, ancestors


@triton.jit(do_not_specialize=["stride", "total", "nodes", "levels"])  # one build for trees of many sizes
def _best(
    tokens, scores, parents, depth, place, kept_tokens, kept_parents, kept_depth, live, ancestors,
    stride, total, nodes, levels, SPAN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    start, out = slot * stride, slot * nodes
    at = tl.arange(0, SPAN)
    real = at < total
    key = tl.where(real, _key(_score(scores + start + at, real), at), LOWEST)
    rank = tl.zeros((SPAN,), tl.int32)
    for first in range(0, total, TILE):
        other = first + tl.arange(0, TILE)
        held = other < total
        ahead = tl.where(held, _key(_score(scores + start + other, held), other), LOWEST)
        rank += tl.sum((ahead[:, None] > key[None, :]).to(tl.int32), 0)
    kept = real & (rank < nodes)
    number = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(place + slot * total + at, number, mask=real)
    tl.store(kept_tokens + out + number, tl.load(tokens + start + at, mask=kept), mask=kept)
    tl.store(kept_depth + out + number, tl.load(depth + start + at, mask=kept), mask=kept)
    tl.store(live + out + number, tl.full((SPAN,), 1, tl.uint8), mask=kept)

    tl.debug_barrier()  # numbers that other threads have stored
    parent = tl.load(place + slot * total + tl.load(parents + start + at, mask=kept, other=0), mask=kept, other=0)
    tl.store(kept_parents + out + number, parent.to(tl.int64), mask=kept)
    tl.debug_barrier()
    column = tl.arange(0, WIDTH)
    for first in range(0, nodes, ROWS):
        node = first + tl.arange(0, ROWS)
        inside = node < nodes
        up = node
        seen = node[:, None] == column[None, :]
        for _ in range(levels):
            up = tl.load(kept_parents + out + up, mask=inside, other=0).to(tl.int32)
            seen = seen | (up[:, None] == column[None, :])
        line = ancestors + (out + node[:, None]) * nodes + column[None, :]
        tl.store(line, seen.to(tl.uint8), mask=inside[:, None] & (column < nodes)[None, :])


@triton.jit
def _score(pointer, mask):
    score = tl.load(pointer, mask=mask, other=0)
    return tl.where(score <= 0, score, float("-inf"))


def follow(
    tokens: Tensor, parents: Tensor, depth: Tensor, live: Tensor, ancestors: Tensor, want: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """`DraftTree.follow`: one program a slot."""
    batch, nodes = tokens.shape
    path = tokens.new_empty(batch, length)
    counts = tokens.new_empty(batch)
    width = triton.next_power_of_2(nodes)
    with _on(tokens):
        _follow[(batch,)](
            tokens.contiguous(), parents.contiguous(), depth.contiguous(), live.contiguous().view(torch.uint8),
            ancestors.contiguous().view(torch.uint8), want.contiguous(), path, counts, nodes, length,
            WIDTH=width, ROWS=_rows_at_once(width), LENGTH=triton.next_power_of_2(length), num_warps=4,
        )  # fmt: skip
    return path, counts


@triton.jit(do_not_specialize=["nodes", "length"])
def _follow(
    tokens, parents, depth, live, ancestors, want, path, counts, nodes, length,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    start = slot * nodes
    column = tl.arange(0, WIDTH)
    held = column < nodes
    parent = tl.load(parents + start + column, mask=held, other=0)
    wanted = tl.load(want + start + parent, mask=held, other=0)
    agrees = tl.load(tokens + start + column, mask=held, other=0) == wanted
    agrees = agrees & (tl.load(live + start + column, mask=held, other=0) != 0)
    stray = held & (column > 0) & (agrees == 0)

    step = tl.arange(0, LENGTH)
    tl.store(path + slot * length + step, tl.zeros((LENGTH,), tl.int64), mask=step < length)
    tl.debug_barrier()  # what lies beyond the path is the root, what lies on it comes now
    accepted = tl.zeros((ROWS,), tl.int64)
    for first in range(0, nodes, ROWS):
        node = first + tl.arange(0, ROWS)
        inside = node < nodes
        line = ancestors + (start + node[:, None]) * nodes + column[None, :]
        seen = tl.load(line, mask=inside[:, None] & held[None, :], other=0) != 0
        good = inside & (tl.sum((seen & stray[None, :]).to(tl.int32), 1) == 0)
        accepted += good.to(tl.int64)
        # Accepted nodes are one line: no two have the same depth.
        deep = tl.load(depth + start + node, mask=inside, other=0)
        tl.store(path + slot * length + deep, node.to(tl.int64), mask=good & (deep < length))
    tl.store(counts + slot, tl.sum(accepted, 0))


def _rows_at_once(width: int) -> int:
    """How many rows of the ancestors, this wide, fit into the registers of a program."""
    return min(width, max(1, 2048 // width))


@triton.jit
def _finite(top):
    """A level to take exponents from: where nothing is above -inf, -inf - -inf would be no number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _largest(keys, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The COUNT largest of different keys, falling; the lanes beyond hold nothing."""
    lane = tl.arange(0, LANES)
    chosen = tl.full((LANES,), LOWEST, tl.int64)
    for turn in range(COUNT):
        largest = tl.max(keys, 0)
        chosen = tl.where(lane == turn, largest, chosen)
        keys = tl.where(keys == largest, LOWEST, keys)
    return chosen


@triton.jit
def _key(value, index):
    """An integer that sorts as float32 values do: the lower index first among equals, no number above all numbers."""
    order = _sortable(value.to(tl.int32, bitcast=True))
    order = tl.where(value == value, order, LAST)  # noqa: PLR0124 - only what is no number differs from itself
    return (order.to(tl.int64) << 32) | (index ^ LAST).to(tl.int64)


@triton.jit
def _index(key):
    return (key & LAST).to(tl.int32) ^ LAST


@triton.jit
def _value(key):
    return _sortable((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _sortable(bits):
    """The bits of a float32 as an integer of the same order, and back: magnitudes below zero count backwards."""
    return bits ^ ((bits >> 31) & LAST)
