"""Conversations -> batches: what is an answer, padding on the right, an order that can be taken up again anywhere.

Which slots train. Slot i holds (embedding of token i+1, f_i) and drafts token i+2. It trains iff tokens i+1 and i+2
both belong to an answer, its end token included: these are the slots that drafting ever asks, because the first token
of an answer is the target's own choice at prefill. Every answer of a conversation trains.

    tokens    <user> what ? <assistant> two cats <end>         answer  0 0 0 0 1 1 1
    slot i    drafts token i+2 from embedding i+1              trains  i = 3 (cats), 4 (<end>)
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from speculens.conversation import Conversation
from speculens.data.sources import Source
from speculens.errors import UserError
from speculens.targets import Target, processing

PAD_TO = 16  # widths of batches are multiples of this, so that a GPU sees few shapes
WINDOW = 32  # batches whose rows are sorted by size together
TIMEOUT = 600  # seconds without a batch after which a worker is taken for dead


@dataclass(frozen=True)
class Row:
    """One encoded conversation of n tokens.

    inputs  what the model's own forward takes, a batch of one
    image   (n,) bool, image rows
    answer  (n,) bool, tokens of answers with their end tokens
    """

    inputs: Mapping[str, Tensor]
    image: Tensor
    answer: Tensor


# The row of a number. Raises UserError for a row that cannot train.
Reader = Callable[[int], Row]


@dataclass(frozen=True)
class Batch:
    """B rows padded to width n.

    inputs   of one forward; attention_mask (B, n) marks the real rows
    image    (B, n) bool
    slots    (2, P) long: row and slot of every position that trains
    refused  why rows of this batch are missing
    """

    inputs: dict[str, Tensor]
    image: Tensor
    slots: Tensor
    refused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.image)

    @property
    def positions(self) -> int:
        """P, the answer positions that train."""
        return self.slots.shape[1]

    def pin_memory(self) -> Batch:
        """In page-locked memory, for a fast way to the GPU (the data loader calls this)."""
        inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, image=self.image.pin_memory(), slots=self.slots.pin_memory())


class Encoder:
    """Turns conversations into rows and rows into batches. Knows the target's processor and config, not its weights."""

    def __init__(self, target: Target, max_length: int) -> None:
        self._processor, self._config, self._positions = target.processor, target.model.config, target.positions
        self._ends = torch.tensor(sorted(target.eos_token_ids), dtype=torch.long)
        self._dialogue = target.processor.chat_template is not None
        self.dtype, self._max_length = target.dtype, max_length
        self._target = _full_name(target.model.name_or_path)
        self._pad = getattr(target.tokenizer, "pad_token_id", None) or 0

    @property
    def about(self) -> dict[str, Any]:
        """All that a row depends on beside its conversation, in plain JSON types."""
        return {
            "target": self._target,
            "revision": getattr(self._config, "_commit_hash", None),
            "ends": self._ends.tolist(),
            "dtype": str(self.dtype),
            "max_length": self._max_length,
            **processing.described(self._processor),
        }

    def row(self, conversation: Conversation) -> Row:
        """Encode up to the last answer. Raises UserError for a row that cannot train."""
        conversation = _up_to_last_answer(conversation)
        inputs, image = self.encode(conversation)
        answer = self._answer_mask(conversation, inputs["input_ids"][0])
        row = _cut(Row(inputs, image, answer), self._max_length)
        if not trains(row.answer).any():
            raise UserError("no answer is left to learn from within max_length.")
        return row

    def fresh(self, source: Source) -> Reader:
        """Rows encoded each time they are asked for."""
        return lambda index: self.row(source[index])

    def batch(self, rows: Iterable[Row | UserError]) -> Batch:
        """Collate; rows that cannot be used are left out and named in `refused`.

        If none can be used, the batch is one row that nobody learns from: it is still a pass, and processes that share
        a run must all make equally many.
        """
        rows = list(rows)
        usable = [row for row in rows if isinstance(row, Row)]
        refused = tuple(str(row) for row in rows if isinstance(row, UserError))
        batch = collate(usable or [self._blank()], self._pad, self.dtype)
        return replace(batch, inputs=batch.inputs | self._positions(batch.inputs), refused=refused)

    def _blank(self) -> Row:
        inputs, image = self.encode(Conversation.user("?", [Image.new("RGB", (64, 64))]))
        return Row(inputs, image, torch.zeros_like(image))

    def encode(self, conversation: Conversation, *, open_end: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """Ids, pixels and all else that one forward takes, and the image rows."""
        return processing.encode(self._processor, self._config, conversation, add_generation_prompt=open_end)

    def _answer_mask(self, conversation: Conversation, ids: Tensor) -> Tensor:
        """(n,) bool: from the end of the prompt before an answer to its first end token, or else its message's end."""
        mask = torch.zeros(len(ids), dtype=torch.bool)
        spans = _Spans(self, conversation, ids)
        messages = conversation.messages
        for number, message in enumerate(messages):
            last = number == len(messages) - 1
            # Without a chat template the earlier turns are one bidirectional prompt, which nothing may be learnt from.
            if message.role != "assistant" or not (last or self._dialogue):
                continue
            start = spans.agreement(number, open_end=True)
            stop = len(ids) if last else spans.agreement(number + 1, open_end=False)
            ends = torch.isin(ids[start:stop], self._ends).nonzero()
            mask[start : start + int(ends[0]) + 1 if len(ends) else stop] = True
        return mask


def _full_name(name: str) -> str:
    """The same from wherever a folder is named; a hub id is itself."""
    return str(Path(name).resolve()) if Path(name).exists() else name


class _Spans:
    """Where the tokens of a conversation stop agreeing with those of its first messages alone.

    The same conversation without its pictures is cheap to encode, and behind the last picture its tokens are the same,
    counted from the end. Where they are not (a later picture, a family that insists on pictures), all is encoded again.
    """

    def __init__(self, encoder: Encoder, conversation: Conversation, ids: Tensor) -> None:
        self._encoder, self._whole, self._ids = encoder, conversation, ids
        self._bare = _without_pictures(conversation) if conversation.images else None
        self._bare_ids = self._ids_of(self._bare)

    def agreement(self, count: int, *, open_end: bool) -> int:
        """The first token of the whole that the first `count` messages, rendered alone, do not share."""
        if self._bare is not None and self._bare_ids is not None:
            head = self._ids_of(Conversation(self._bare.messages[:count]), open_end=open_end)
            if head is not None:
                left = len(self._bare_ids) - _common(self._bare_ids, head)
                if left <= len(self._ids) and torch.equal(self._ids[len(self._ids) - left :], self._bare_ids[-left:]):
                    return len(self._ids) - left
        inputs, _ = self._encoder.encode(Conversation(self._whole.messages[:count]), open_end=open_end)
        return _common(self._ids, inputs["input_ids"][0])

    def _ids_of(self, conversation: Conversation | None, *, open_end: bool = False) -> Tensor | None:
        if conversation is None:
            return None
        try:
            return self._encoder.encode(conversation, open_end=open_end)[0]["input_ids"][0]
        except UserError:
            return None


def _common(first: Tensor, second: Tensor) -> int:
    """Length of the common prefix."""
    width = min(len(first), len(second))
    differ = (first[:width] != second[:width]).nonzero()
    return int(differ[0]) if len(differ) else width


def _without_pictures(conversation: Conversation) -> Conversation:
    messages = (
        replace(message, content=tuple(part for part in message.content if isinstance(part, str)))
        for message in conversation.messages
    )
    return Conversation(tuple(messages))


def _up_to_last_answer(conversation: Conversation) -> Conversation:
    count = len(conversation.messages)
    while count and conversation.messages[count - 1].role != "assistant":
        count -= 1
    if not count:
        raise UserError("it has no answer to learn from.")
    return Conversation(conversation.messages[:count])


def _cut(row: Row, max_length: int) -> Row:
    """At most `max_length` tokens; a row whose pictures would suffer is refused."""
    if len(row.answer) <= max_length:
        return row
    if row.image[max_length:].any():
        raise UserError(f"its {len(row.answer)} tokens are cut at max_length {max_length} in or before a picture.")
    whole = row.inputs["input_ids"].shape
    inputs = {k: v[:, :max_length] if v.shape == whole else v for k, v in row.inputs.items()}
    return Row(inputs, row.image[:max_length], row.answer[:max_length])


def trains(answer: Tensor) -> Tensor:
    """Answers (..., n) bool -> (..., n - 1) bool over slots: tokens i+1 and i+2 both belong to an answer."""
    slots = torch.zeros_like(answer[..., 1:])
    slots[..., :-1] = answer[..., 1:-1] & answer[..., 2:]
    return slots


def collate(rows: Sequence[Row], pad: int, dtype: torch.dtype) -> Batch:
    """One rule for every family: what has the shape of input_ids is padded on the right, all else is concatenated.

    Padded tokens are `pad`, everything else is padded with 0. Concatenated tensors that differ behind their first
    dimension (numbers of tiles, say) are padded with 0 there, as processors do themselves.
    """
    width = max(len(row.answer) for row in rows)
    width += -width % PAD_TO
    inputs: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for name in row.inputs):
        parts = [row.inputs[name] for row in rows if name in row.inputs]
        in_step = all(name in row.inputs and row.inputs[name].shape == row.inputs["input_ids"].shape for row in rows)
        if in_step:
            inputs[name] = torch.cat([_pad(part, (1, width), pad if name == "input_ids" else 0) for part in parts])
        else:
            largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
            joined = torch.cat([_pad(part, (len(part), *largest), 0) for part in parts])
            inputs[name] = joined.to(dtype) if joined.is_floating_point() else joined
    image = _stack([row.image for row in rows], width)
    answer = _stack([row.answer for row in rows], width)
    return Batch(inputs, image, trains(answer).nonzero().T.contiguous())


def _pad(part: Tensor, shape: Sequence[int], value: int) -> Tensor:
    if tuple(part.shape) == tuple(shape):
        return part
    padded = part.new_full(tuple(shape), value)
    padded[tuple(slice(size) for size in part.shape)] = part
    return padded


def _stack(masks: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack([_pad(mask, (width,), 0) for mask in masks])


class Order(Sampler[list[int]]):
    """Which rows make up which batch: a function of (seed, epoch) alone, so any batch can be found again by its number.

    Rows are shuffled, then sorted by size within windows of some batches, then the batches are shuffled: one endless
    line of batches. Of `world` processes, process `rank` takes every `world`-th from number `rank` on, so that any
    share of the same work among processes and passes makes the same updates.

    batches    in one pass over the data
    per_epoch  of them for one process, rounded down
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self._sizes, self._batch, self._seed = torch.tensor(sizes), batch_size, seed
        self._rank, self._world = rank, world
        self.start = 0
        self.batches = -(-len(sizes) // batch_size)
        self.per_epoch = self.batches // world
        if self.per_epoch == 0:
            raise UserError(f"{len(sizes)} conversations do not make one batch for each of {world} processes.")
        self._pass = lru_cache(maxsize=2)(self._shuffled)

    def epoch(self, number: int) -> list[list[int]]:
        """The `per_epoch` batches that this process takes in its turns from `number * per_epoch` on."""
        turns = range(number * self.per_epoch, (number + 1) * self.per_epoch)
        places = (divmod(turn * self._world + self._rank, self.batches) for turn in turns)
        return [self._pass(epoch)[place] for epoch, place in places]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """All batches of one pass over the data."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self._sizes), generator=generator)
        windows = (window[self._sizes[window].argsort(stable=True)] for window in rows.split(WINDOW * self._batch))
        batches = [batch for window in windows for batch in window.split(self._batch)]
        return [batches[turn].tolist() for turn in torch.randperm(len(batches), generator=generator).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches without end, from its turn `start` on."""
        epoch, skip = divmod(self.start, self.per_epoch)
        while True:
            yield from islice(self.epoch(epoch), skip, None)
            epoch, skip = epoch + 1, 0


class _Batches(Dataset[Batch]):
    """Batch by the numbers of its rows: reading, decoding and processing happen in whoever calls."""

    def __init__(self, read: Reader, encoder: Encoder) -> None:
        self._read, self._encoder = read, encoder

    def __getitem__(self, indices: Any) -> Batch:
        return self._encoder.batch(attempt(partial(self._read, index)) for index in indices)


def attempt(read: Callable[[], Row]) -> Row | UserError:
    """A row, or why there is none."""
    try:
        return read()
    except UserError as error:
        return error


@contextmanager
def stream(read: Reader, encoder: Encoder, order: Order, workers: int, *, pin: bool) -> Iterator[Iterator[Batch]]:
    """Batches in order, without end, prepared ahead by `workers` processes, which end with the context.

    Raises UserError if one of them dies or makes nothing for TIMEOUT seconds.
    """
    # Forked, not spawned: processors with a class made at run time cannot be pickled. Workers never touch the GPU.
    forked = "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None
    loader = DataLoader(
        _Batches(read, encoder),
        sampler=order,
        batch_size=None,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=pin,
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=_begin_worker,
        multiprocessing_context=forked,
    )
    batches = iter(loader)
    with _told_of_death(workers):
        try:
            yield batches
        finally:
            if workers:
                batches._shutdown_workers()  # type: ignore[attr-defined]  # noqa: SLF001 - nothing public ends them


@contextmanager
def _told_of_death(workers: int) -> Iterator[None]:
    """A UserError for what torch raises when a worker dies or hangs, wherever this process is just then."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            raise
        raise UserError(
            f"One of {workers} workers was killed or hung while it prepared batches, most likely because memory ran "
            "out or pictures are slow to fetch: lower workers or free memory, keep pictures at hand, and go on with "
            "--resume-from latest."
        ) from error


def _same(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
