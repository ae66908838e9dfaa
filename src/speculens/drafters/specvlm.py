"""SpecVLM: a picture's rows are compressed before the EAGLE-2 head sees them (arXiv 2509.11815, section 3.2).

    z    = MLP(mean of the target's features over the question)     one number an operator
    rows = the operator of the largest z, over the picture's rows    prune, pool, conv, resample or none

Slot i holds (embedding of token i+1, feature f_i), so slot i is visual if token i+1 is: these slots are compressed, run
by run. Text slots stay as they are, at their own positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speculens.attention import causal_attention
from speculens.drafters.compress import OPERATORS, RATIOS, Compressed, CompressOptions
from speculens.drafters.config import DrafterConfig
from speculens.drafters.eagle import EagleDrafter
from speculens.drafters.layer import Attend, biased_attention
from speculens.drafters.rows import Rows
from speculens.features import Features
from speculens.ops import send

# Weight, as a key, of a row that was not selected: nothing to the output, and yet a gradient with respect to it.
UNSELECTED = 1e-8


@dataclass(frozen=True)
class Run:
    """One stretch of visual slots: slots start .. stop-1 of a sequence, and the rows of the question about it."""

    sequence: int
    start: int
    stop: int
    question: range

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Group:
    """R runs of equal length m, as the operators take them.

    runs           their numbers; index (R,) long, the same on the device
    start          (R, 1) long, their first slots
    embeds, hidden (R, m, H)
    """

    runs: Sequence[int]
    index: Tensor
    start: Tensor
    embeds: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Block:
    """Rows that some runs of equal length became.

    runs    (R,) numbers of the runs
    bias    (R,) log of their weight as keys; None: all count fully
    """

    runs: Sequence[int]
    rows: Compressed
    bias: Tensor | None = None


class SpecVLMDrafter(EagleDrafter):
    """The EAGLE-2 head behind an elastic compressor."""

    name = "specvlm"
    image_contract = "compress"

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.options = options = CompressOptions.read(config.options)
        self.operators = nn.ModuleDict({name: OPERATORS[name](config, options) for name in options.used})
        self.gate: nn.Module | None = None
        if options.mode != "concat" and len(options.used) > 1:
            self.gate = nn.Sequential(
                nn.Linear(config.target_hidden_size, options.gate_width),
                nn.SiLU(),
                nn.Linear(options.gate_width, len(options.used)),
            )
        self.temperature = options.temperature[0]

    def anneal(self, progress: float) -> None:
        """Cool the gate's Gumbel-softmax; progress from 0 to 1."""
        hot, cold = self.options.temperature
        self.temperature = hot + (cold - hot) * progress

    def forward(self, rows: Rows, attend: Attend = causal_attention, step: int = 0) -> Tensor:
        """Rows -> predicted features (B, m, H)."""
        return super().forward(rows, attend if rows.bias is None else biased_attention(attend, rows.bias), step)

    def view(self, features: Features, next_embeds: Tensor) -> Rows:
        """Text slots as they are, and each run's operator in its place."""
        runs = find_runs(features, self.options.question_tokens)
        blocks, notes = self._compress(features, next_embeds, runs)
        return _assemble(features, next_embeds, runs, blocks, notes)

    def choices(self, features: Features) -> list[list[str]]:
        """Mode `select`: the operator of each run of each sequence, by name. Other modes choose none: empty lists."""
        runs = find_runs(features, self.options.question_tokens)
        return _by_sequence(features, runs, self._names(features, runs) if self.options.mode == "select" else [])

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows, with the operators and their defaults spelled out."""
        options = self.options
        named = {name: f"{name} {options.ratio(name):g}x" for name in options.used if name in RATIOS}
        named |= {"resample": f"resample to {options.queries}", "none": "none"}
        verb = {"select": "one of", "weighted": "weighted sum of", "concat": "all of"}[options.mode]
        return {**super().describe(), "view": f"{verb} {', '.join(named[name] for name in options.used)}"}

    @property
    def _learning(self) -> bool:
        """Decoding never learns, also with a drafter that nobody told to evaluate."""
        return self.training and torch.is_grad_enabled()

    # Choosing

    def _logits(self, features: Features, runs: Sequence[Run]) -> Tensor:
        """z: (R, operators), float32 or wider."""
        assert self.gate is not None  # noqa: S101 - for the type checker: asked only where there is one
        spans = [(run.sequence, run.question.start, run.question.stop) for run in runs]
        sequence, start, stop = send(torch.tensor(spans), features.hidden.device).T[..., None]
        row = start + torch.arange(max(len(run.question) for run in runs), device=start.device)
        share = ((row < stop) / (stop - start)).to(features.hidden.dtype)
        mean = (share[:, None] @ features.hidden[sequence, row.minimum(stop - 1)])[:, 0]
        z = self.gate(mean)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def _names(self, features: Features, runs: Sequence[Run]) -> list[str]:
        used = self.options.used
        if not runs or self.gate is None:
            return [used[0]] * len(runs)
        return [used[best] for best in self._logits(features, runs).argmax(-1).tolist()]

    def _draw(self, z: Tensor) -> Tensor:
        """Straight-through Gumbel-softmax: one operator a run, 0 or 1, with the soft choice's gradient."""
        noise = -torch.empty_like(z).exponential_().log()
        soft = ((z + noise) / self.temperature).softmax(-1)
        hard = nn.functional.one_hot(soft.argmax(-1), z.shape[-1])
        return soft + (hard - soft).detach()

    # Compressing

    def _compress(
        self, features: Features, next_embeds: Tensor, runs: Sequence[Run]
    ) -> tuple[list[Block], Mapping[str, list[str]]]:
        """The blocks of all runs, in the order in which they stand in a run, and what to note of each run."""
        used, mode = self.options.used, self.options.mode
        if not runs:
            return [], {}
        groups = _by_length(dict(enumerate(runs)), features, next_embeds) if mode != "select" or self._learning else []
        if mode == "concat":
            return [self._block(name, group) for group in groups for name in used], {}
        if mode == "weighted":
            return self._mix(features, groups, runs), {}
        if self.gate is not None and self._learning:
            bias = (self._draw(self._logits(features, runs)) + UNSELECTED).log()
            return [
                replace(self._block(name, group), bias=bias[group.index, number])
                for group in groups
                for number, name in enumerate(used)
            ], {}
        names = self._names(features, runs)
        chosen = {name: {i: run for i, run in enumerate(runs) if names[i] == name} for name in used}
        return [
            self._block(name, group)
            for name, theirs in chosen.items()
            for group in _by_length(theirs, features, next_embeds)
        ], {"operator": names}

    def _block(self, name: str, group: Group) -> Block:
        """One operator over runs of one length. `last` becomes a slot of the sequence."""
        embeds, hidden, last = self.operators[name](group.embeds, group.hidden)
        return Block(group.runs, Compressed(embeds, hidden, group.start + last))

    def _mix(self, features: Features, groups: Sequence[Group], runs: Sequence[Run]) -> list[Block]:
        """Mode `weighted`: the operators' rows, one by one, added up with the gate's softmax."""
        shape = (len(runs), len(self.options.used))
        share = self._logits(features, runs).softmax(-1) if self.gate is not None else features.hidden.new_ones(shape)
        share, mixed = share.to(features.hidden.dtype), []
        for group in groups:
            parts = [self._block(name, group).rows for name in self.options.used]
            weights = share[group.index].T[..., None, None]  # (operators, R, 1, 1)
            embeds, hidden = (
                (weights * torch.stack(streams)).sum(0)
                for streams in ([part.embeds for part in parts], [part.hidden for part in parts])
            )
            mixed.append(Block(group.runs, Compressed(embeds, hidden, parts[-1].last)))
        return mixed


def find_runs(features: Features, question_tokens: int) -> list[Run]:
    """The visual slots, stretch by stretch, and what is asked about each.

    The question: the text between the last picture and the answer (where answers are marked, as in training; else the
    end), at most its last `question_tokens` rows.
    """
    image = features.image.numpy()
    lengths = features.lengths.tolist()
    answer = None if features.answer is None else features.answer.numpy()
    runs = []
    for sequence, length in enumerate(lengths):
        visual = np.zeros(length + 1, dtype=np.int8)
        visual[1:length] = image[sequence, 1:length]  # at row i + 1 where slot i is meant
        starts, stops = (np.flatnonzero(np.diff(visual) == sign) for sign in (1, -1))
        pictures = np.flatnonzero(image[sequence, :length])
        answers = np.empty(0, int) if answer is None else np.flatnonzero(answer[sequence, :length])
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            after = answers[answers > stop]
            end = int(after[0]) if len(after) else length
            asked = int(pictures[pictures < end][-1]) + 1
            runs.append(Run(sequence, start, stop, range(min(max(asked, end - question_tokens), end - 1), end)))
    return runs


def _by_length(runs: Mapping[int, Run], features: Features, next_embeds: Tensor) -> list[Group]:
    """Numbered runs, those of equal length together: operators work on them as one batch."""
    groups: dict[int, list[int]] = {}
    for number, run in runs.items():
        groups.setdefault(run.length, []).append(number)
    return [
        _gather(numbers, [runs[number] for number in numbers], features, next_embeds) for numbers in groups.values()
    ]


def _gather(numbers: list[int], runs: Sequence[Run], features: Features, next_embeds: Tensor) -> Group:
    table = torch.tensor([(number, run.sequence, run.start) for number, run in zip(numbers, runs, strict=True)])
    index, sequence, start = send(table, next_embeds.device).T[..., None]
    slot = start + torch.arange(runs[0].length, device=start.device)
    return Group(numbers, index[:, 0], start, next_embeds[sequence, slot], features.hidden[sequence, slot])


def _assemble(
    features: Features, next_embeds: Tensor, runs: Sequence[Run], blocks: Sequence[Block], notes: Mapping[str, Any]
) -> Rows:
    """Put the blocks where their runs stood; sequences differ in length, so pad on the right.

    All rows there are, text slots and then blocks, form one list; an index into it says which row stands where.
    """
    batch, slots, size = next_embeds.shape
    layout = torch.from_numpy(_layout(features, runs, blocks, slots))
    index = send(layout.clamp(min=0), next_embeds.device)

    def lay(text: Tensor, made: Sequence[Tensor]) -> Tensor:
        return torch.cat([text, *made])[index]

    flat = [block.rows for block in blocks]
    embeds = lay(next_embeds.reshape(-1, size), [rows.embeds.reshape(-1, size) for rows in flat])
    hidden = lay(features.hidden.reshape(-1, size), [rows.hidden.reshape(-1, size) for rows in flat])
    positions = lay(send(features.positions, index.device).reshape(-1), [rows.last.reshape(-1) for rows in flat])
    source = torch.where((layout >= 0) & (layout < batch * slots), layout % slots, -1)
    bias = None
    biases = [b.bias[:, None].expand(b.rows.last.shape).reshape(-1) for b in blocks if b.bias is not None]
    if biases:
        bias = lay(biases[0].new_zeros(batch * slots), biases)
    return Rows(embeds, hidden, positions, source, bias=bias, notes=_notes(features, runs, notes))


def _layout(features: Features, runs: Sequence[Run], blocks: Sequence[Block], slots: int) -> np.ndarray:
    """(B, M) of indices into the list of all rows, -1 at padding."""
    batch = len(features.lengths)
    made: list[list[np.ndarray]] = [[] for _ in runs]
    first = batch * slots
    for block in blocks:
        for number in block.runs:
            count = block.rows.last.shape[1]
            made[number].append(np.arange(first, first + count))
            first += count
    learning = any(block.bias is not None for block in blocks)
    pieces: list[list[np.ndarray]] = [[] for _ in range(batch)]
    reached = [0] * batch
    for run, rows in zip(runs, made, strict=True):
        base = run.sequence * slots
        pieces[run.sequence].append(np.arange(base + reached[run.sequence], base + run.start))
        few = np.concatenate(rows) if rows else np.empty(0, int)
        # The drafter's cache has room for as many rows as the target's: a tiny run gives no more than it was.
        pieces[run.sequence].append(few if learning else few[: run.length])
        reached[run.sequence] = run.stop
    for sequence, length in enumerate(features.lengths.tolist()):
        pieces[sequence].append(np.arange(sequence * slots + reached[sequence], sequence * slots + length))
    lines = [np.concatenate(piece) for piece in pieces]
    index = np.full((batch, max(map(len, lines))), -1)
    for sequence, line in enumerate(lines):
        index[sequence, : len(line)] = line
    return index


def _by_sequence(features: Features, runs: Sequence[Run], values: Sequence[str]) -> list[list[str]]:
    sorted_out: list[list[str]] = [[] for _ in range(len(features.lengths))]
    for run, value in zip(runs, values, strict=False):
        sorted_out[run.sequence].append(value)
    return sorted_out


def _notes(features: Features, runs: Sequence[Run], notes: Mapping[str, Sequence[str]]) -> tuple[dict[str, Any], ...]:
    """What is noted of each sequence."""
    split = {key: _by_sequence(features, runs, values) for key, values in notes.items()}
    return tuple({key: lists[i] for key, lists in split.items()} for i in range(len(features.lengths)))
