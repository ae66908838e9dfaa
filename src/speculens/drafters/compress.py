"""SpecVLM's elastic visual compressor (arXiv 2509.11815, section 3.2): many visual rows of the drafter become few.

An operator takes the rows of R runs of equal length m (what the drafter would have seen of R pictures) and returns k of
them. Embedding and feature of a row go through the same operator, and a new row stands at the last position of the
group that it was made of (both ours: the paper leaves them open).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from speculens.drafters.config import DrafterConfig
from speculens.errors import UserError
from speculens.ops import gather_rows, send
from speculens.values import read

# What each mode may use, in the order in which it is used.
MODES = {
    "select": ("prune", "pool", "conv", "resample", "none"),
    "weighted": ("prune", "pool", "conv"),
    "concat": ("prune", "pool", "conv", "resample"),
}
RATIOS = {"prune": 20.0, "pool": 20.0, "conv": 3.0}


@dataclass(frozen=True)
class CompressOptions:
    """What only this view knows (`options` of a drafter's config). Defaults are the paper's unless "ours".

    mode             select: a gate picks one operator | weighted: it mixes them | concat: all outputs in a row
    operators        of the mode's, in order; None takes all of them
    ratios           rows in per row out; conv's is a whole number
    common_ratio     the one ratio of all operators in mode `weighted`
    keep             what prune keeps: random (by seed and length of the run) | norm (the largest target features; ours)
    seed             of the random subset
    grid             rows and columns of a run whose length is their product; a square is found without it (ours)
    queries          rows that resample makes of a run
    resample_width   inner width of its attention; None takes the target's hidden size (ours)
    depthwise        convolve each channel by itself: H x ratio weights instead of H x H x ratio (ours)
    gate_width       inner width of the gate (ours)
    question_tokens  the gate reads at most so many of the question's last tokens (ours)
    temperature      of Gumbel-softmax at the start and at the end of training (ours)
    """

    mode: str = "select"
    operators: tuple[str, ...] | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    common_ratio: int = 3
    keep: str = "random"
    seed: int = 0
    grid: tuple[int, int] | None = None
    queries: int = 2
    resample_width: int | None = None
    depthwise: bool = False
    gate_width: int = 128
    question_tokens: int = 64
    temperature: tuple[float, float] = (1.0, 0.5)

    @staticmethod
    def read(values: Mapping[str, Any]) -> CompressOptions:
        """From a config's `options`; raises UserError on a key or value that means nothing."""
        made = read(CompressOptions, values, "The options of SpecVLM")
        if fault := made.fault():
            raise UserError(f"The options of SpecVLM do not work: {fault}.")
        return made

    def fault(self) -> str | None:
        """The first thing that is wrong, or None."""
        if self.mode not in MODES:
            return f"mode '{self.mode}' is none of {', '.join(MODES)}"
        able, used = MODES[self.mode], self.used
        counts = (self.common_ratio, self.queries, self.gate_width, self.question_tokens, self.resample_width or 1)
        wrong = {
            f"operators of mode {self.mode} are distinct ones of {', '.join(able)}": not used
            or len(set(used)) < len(used)
            or not set(used) <= set(able),
            f"ratios are at least 1 and belong to {', '.join(RATIOS)}": not set(self.ratios) <= set(RATIOS)
            or any(ratio < 1 for ratio in self.ratios.values()),
            "the ratio of conv, its stride, is a whole number": self.ratio("conv") % 1 != 0,
            "keep is random or norm": self.keep not in ("random", "norm"),
            "grid is rows and columns, each above 0": self.grid is not None and min(self.grid) < 1,
            "common_ratio, queries, widths and question_tokens are above 0": min(counts) < 1,
            "temperature is two positive numbers, at the start and at the end": min(self.temperature) <= 0,
        }
        return next((what for what, is_wrong in wrong.items() if is_wrong), None)

    @property
    def used(self) -> tuple[str, ...]:
        """The operators of this drafter."""
        return MODES[self.mode] if self.operators is None else self.operators

    def ratio(self, operator: str) -> float:
        """Rows in per row out."""
        if self.mode == "weighted":
            return self.common_ratio
        return self.ratios.get(operator, RATIOS[operator])


class Compressed(NamedTuple):
    """k rows of each of R runs.

    embeds, hidden  (R, k, H)
    last            (R, k) long, the last row of the run, 0 .. m-1, that each was made of
    """

    embeds: Tensor
    hidden: Tensor
    last: Tensor


class Prune(nn.Module):
    """Keep ceil(m / ratio) rows in their order: a random subset, or those of the largest target features."""

    def __init__(self, _config: DrafterConfig, options: CompressOptions) -> None:
        super().__init__()
        self.ratio, self.keep, self.seed = options.ratio("prune"), options.keep, options.seed

    def forward(self, embeds: Tensor, hidden: Tensor) -> Compressed:
        runs, rows = embeds.shape[:2]
        count = math.ceil(rows / self.ratio)
        if self.keep == "random":
            kept = _subset(rows, count, self.seed, embeds.device).expand(runs, -1)
        else:
            kept = hidden.float().norm(dim=-1).topk(count).indices.sort().values
        return Compressed(gather_rows(embeds, kept), gather_rows(hidden, kept), kept)


class Pool(nn.Module):
    """The mean of each group: tiles of the picture's grid where it is known, else stretches of the run."""

    def __init__(self, _config: DrafterConfig, options: CompressOptions) -> None:
        super().__init__()
        self.ratio, self.grid = options.ratio("pool"), options.grid
        self.flat = options.mode == "weighted"  # there its rows must match those of the others one by one

    def forward(self, embeds: Tensor, hidden: Tensor) -> Compressed:
        rows = embeds.shape[1]
        grid = None if self.flat else known_grid(rows, self.grid)
        group = _stretches(rows, math.ceil(rows / self.ratio)) if grid is None else _tiles(*grid, self.ratio)
        number = torch.arange(int(group[-1]) + 1, device=embeds.device)
        member = (send(group, embeds.device) == number[:, None]).to(embeds.dtype)  # (k, m)
        mean = member / member.sum(1, keepdim=True)
        place = torch.arange(rows, device=embeds.device)
        last = torch.where(member > 0, place, 0).amax(1)
        return Compressed(mean @ embeds, mean @ hidden, last.expand(len(embeds), -1))


class Conv(nn.Module):
    """A learned convolution whose stride is its width, at first the mean. A short last group repeats its last row."""

    def __init__(self, config: DrafterConfig, options: CompressOptions) -> None:
        super().__init__()
        size, self.stride = config.target_hidden_size, int(options.ratio("conv"))
        start = torch.ones(size) if options.depthwise else torch.eye(size)
        self.weight = nn.Parameter(start[..., None].repeat_interleave(self.stride, -1) / self.stride)

    def forward(self, embeds: Tensor, hidden: Tensor) -> Compressed:
        rows = embeds.shape[1]
        count = math.ceil(rows / self.stride)
        place = torch.arange(count * self.stride, device=embeds.device).clamp(max=rows - 1)
        both = torch.cat([embeds, hidden])[:, place].unflatten(1, (count, self.stride))
        # Groups do not overlap, so the convolution is one product over each: (2R, k, stride, H) -> (2R, k, H).
        if self.weight.ndim == 2:
            out = (both * self.weight.T).sum(2)
        else:
            out = both.flatten(2) @ self.weight.transpose(1, 2).flatten(1).T
        embeds, hidden = out.chunk(2)
        return Compressed(embeds, hidden, place[self.stride - 1 :: self.stride].expand(len(embeds), -1))


class Resample(nn.Module):
    """One cross-attention layer: learned queries over the run's embeddings, one set of weights for both streams."""

    def __init__(self, config: DrafterConfig, options: CompressOptions) -> None:
        super().__init__()
        size, heads = config.target_hidden_size, config.num_attention_heads
        width = options.resample_width or size
        if width % heads:
            raise UserError(f"resample_width {width} is no multiple of the drafter's {heads} attention heads.")
        self.query = nn.Parameter(torch.randn(heads, options.queries, width // heads))
        self.k_proj = nn.Linear(size, width, bias=False)
        self.v_proj = nn.Linear(size, width, bias=False)
        self.o_proj = nn.Linear(width, size, bias=False)

    def forward(self, embeds: Tensor, hidden: Tensor) -> Compressed:
        runs, rows = embeds.shape[:2]
        query = self.query[:, :rows]  # no operator makes more rows than it was given
        scores = query @ self._heads(self.k_proj(embeds)).transpose(2, 3) / math.sqrt(query.shape[-1])
        weights = scores.softmax(-1)
        embeds, hidden = (self._mix(weights, x) for x in (embeds, hidden))
        return Compressed(embeds, hidden, torch.full((runs, query.shape[1]), rows - 1, device=embeds.device))

    def _mix(self, weights: Tensor, x: Tensor) -> Tensor:
        return self.o_proj((weights @ self._heads(self.v_proj(x))).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (len(self.query), -1)).transpose(1, 2)


class Nothing(nn.Module):
    """No visual row at all: what the text rows' features know of the picture must do."""

    def __init__(self, _config: DrafterConfig, _options: CompressOptions) -> None:
        super().__init__()

    def forward(self, embeds: Tensor, hidden: Tensor) -> Compressed:
        last = torch.zeros(len(embeds), 0, dtype=torch.long, device=embeds.device)
        return Compressed(embeds[:, :0], hidden[:, :0], last)


OPERATORS: dict[str, type[nn.Module]] = {
    "prune": Prune,
    "pool": Pool,
    "conv": Conv,
    "resample": Resample,
    "none": Nothing,
}


def known_grid(rows: int, given: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of a run: as given if they multiply to its length, else a square, else None."""
    if given is not None and given[0] * given[1] == rows:
        return given
    side = math.isqrt(rows)
    return (side, side) if side * side == rows else None


def _stretches(rows: int, count: int) -> Tensor:
    """(rows,) long: the group of each row, `count` groups of sizes that differ by at most one."""
    return torch.arange(rows) * count // rows


def _tiles(height: int, width: int, ratio: float) -> Tensor:
    """(height * width,) long: the group of each cell, tiles of about `ratio` cells, numbered row by row."""
    down, across = (max(1, round(side / math.sqrt(ratio))) for side in (height, width))
    return (_stretches(height, down)[:, None] * across + _stretches(width, across)).flatten()


@lru_cache(maxsize=4096)
def _subset(rows: int, count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) long: the same random rows for every run of this length, so that drafts are a function of the prompt."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + rows)
    return send(torch.randperm(rows, generator=generator)[:count].sort().values, device)
