"""Training batches: drawn charts, real pictures and prose, drawn, tokenised and laid out by worker processes."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from testbed import draw, packs
from testbed.models import FAMILIES, LLAVA, SIDE, TOKEN_PIXELS

ROUND = 64  # sequences are padded to a multiple of this many tokens
LONGEST = 1024  # tokens of a training sequence; longer real rows are left out
PROSE = 384  # tokens of a prose sequence
SOURCES = ("drawn", "real", "prose")
HARD = ("table", "grouped", "scene")  # the kinds whose reading lags behind
APART = 10**9  # indices one worker of one run may use before it meets the next worker's


class Piece(NamedTuple):
    """Part of a batch, of one shape. `targets`: flat indices into ids of the tokens to predict."""

    source: str  # one of SOURCES
    pixels: Tensor | None  # (B, H, W, 3) uint8
    ids: Tensor  # (B, N) int16, right padded
    targets: Tensor  # (k,) int32


class Row(NamedTuple):
    """One sequence before padding; `start` is the first token to predict."""

    picture: np.ndarray | None
    ids: list[int]
    start: int


@dataclass(frozen=True)
class Mixture:
    """What a batch of `pieces` pieces is made of: now and then a real or a prose piece takes a drawn one's place."""

    batch: int = 512  # sequences
    pieces: int = 4
    real: float = 0.08  # share of all pieces
    prose: float = 0.06
    hard: float = 0.0  # share of the drawn pictures that are of `HARD` kinds, beyond their usual part

    @property
    def rows(self) -> int:
        return self.batch // self.pieces


class Writer:
    """Lays out prompts and answers of one family as token ids."""

    def __init__(self, family: str, core: Tokenizer) -> None:
        self.family, self.core = FAMILIES[family], core
        self.before = core.encode(self.family.before, add_special_tokens=False).ids
        self.image, self.pad, self.end = (
            core.token_to_id(name) for name in (self.family.image, self.family.pad, self.family.end)
        )

    def rows(self, pictures: list[np.ndarray], questions: list[str], answers: list[str]) -> list[Row]:
        """One row per picture, question and answer."""
        after = self._encode([self.family.after.format(question=question) for question in questions])
        said = self._encode([self.family.answer.format(answer=answer) for answer in answers])
        made = []
        for picture, tail, answer in zip(pictures, after, said, strict=True):
            tokens = (picture.shape[0] // TOKEN_PIXELS) * (picture.shape[1] // TOKEN_PIXELS)
            prompt = self.before + [self.image] * tokens + tail
            made.append(Row(picture, prompt + answer, len(prompt)))
        return made

    def prose(self, paragraphs: list[str]) -> np.ndarray:
        """All paragraphs as one stream of ids, int16."""
        return np.array([one for ids in self._encode(paragraphs) for one in (*ids, self.end)], dtype=np.int16)

    def piece(self, source: str, rows: list[Row]) -> Piece:
        """Pad rows of one picture size to a common length."""
        length = -(-max(len(row.ids) for row in rows) // ROUND) * ROUND
        ids = np.full((len(rows), length), self.pad, dtype=np.int16)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row.ids)] = row.ids
        targets = [np.arange(row.start, len(row.ids)) + number * length for number, row in enumerate(rows)]
        pixels = None if rows[0].picture is None else torch.from_numpy(np.stack([row.picture for row in rows]))
        return Piece(source, pixels, torch.from_numpy(ids), torch.from_numpy(np.concatenate(targets).astype(np.int32)))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [made.ids for made in self.core.encode_batch(texts, add_special_tokens=False)]


@dataclass
class Feed(IterableDataset):
    """An endless stream of batches (lists of pieces).

    `run` numbers the calls of one training, so that none repeats another's charts.
    """

    family: str
    core: Tokenizer
    folder: Path | None = None
    mixture: Mixture = field(default_factory=Mixture)
    run: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.writer = Writer(self.family, self.core)
        self.sizes = ((SIDE, SIDE),) if self.family == LLAVA.name else draw.SIZES
        self.real = packs.rows(self.folder, "train") if self.mixture.real else []
        paragraphs = packs.prose(self.folder) if self.mixture.prose else []
        self.prose = self.writer.prose(paragraphs)

    def __iter__(self) -> Iterator[list[Piece]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)
        stream = self.run * workers + worker
        chance = random.Random(f"feed/{stream}")
        numbers, real = itertools.count(stream * APART), self._real(chance)
        for turn in itertools.count(worker):  # workers start at different sizes
            yield self._batch(chance, numbers, real, self.sizes[turn % len(self.sizes)])

    def _batch(
        self, chance: random.Random, numbers: Iterator[int], real: Iterator[list[Row]], size: tuple[int, int]
    ) -> list[Piece]:
        mix, pieces = self.mixture, []
        for _ in range(mix.pieces):
            dice = chance.random()
            if self.real and dice < mix.real:
                pieces.append(self.writer.piece("real", next(real)))
            elif len(self.prose) > PROSE and mix.real <= dice < mix.real + mix.prose:
                pieces.append(self.writer.piece("prose", self._paragraphs(chance)))
        drawn = self._drawn(itertools.islice(numbers, (mix.pieces - len(pieces)) * mix.rows), size)
        return pieces + [self.writer.piece("drawn", drawn[at : at + mix.rows]) for at in range(0, len(drawn), mix.rows)]

    def _drawn(self, indices: Iterator[int], size: tuple[int, int]) -> list[Row]:
        """Charts of one size, the shortest answers first, so that pieces need little padding."""
        made = [draw.sample(0, index, size, self._kind(index)) for index in indices]
        pictures = [np.asarray(one.image) for one in made]
        rows = self.writer.rows(pictures, [one.question for one in made], [one.answer for one in made])
        return sorted(rows, key=lambda row: len(row.ids))

    def _kind(self, index: int) -> str | None:
        return HARD[index % len(HARD)] if random.Random(index).random() < self.mixture.hard else None

    def _real(self, chance: random.Random) -> Iterator[list[Row]]:
        """Real rows, gathered until a piece of one size is full."""
        waiting: dict[tuple[int, int], list[Row]] = defaultdict(list)
        while True:
            one = chance.choice(self.real)
            picture = one.image()
            size = nearest(picture.size, self.sizes)
            (row,) = self.writer.rows([resized(picture, size)], [one.question], [one.answer])
            if len(row.ids) > LONGEST:
                continue
            waiting[size].append(row)
            if len(waiting[size]) == self.mixture.rows:
                yield waiting.pop(size)

    def _paragraphs(self, chance: random.Random) -> list[Row]:
        starts = [chance.randrange(len(self.prose) - PROSE) for _ in range(self.mixture.rows)]
        return [Row(None, self.prose[start : start + PROSE].tolist(), 1) for start in starts]


def loader(feed: Feed, workers: int, pinned: bool) -> DataLoader:
    """Batches from `workers` processes, each two ahead. Ask for its iterator before touching the GPU: workers fork."""
    several = {"prefetch_factor": 2, "timeout": 120, "persistent_workers": True} if workers else {}
    return DataLoader(feed, batch_size=None, num_workers=workers, pin_memory=pinned, collate_fn=_as_is, **several)


def nearest(size: tuple[int, int], sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (width, height) of `sizes` closest in shape."""
    shape = np.log(size[0] / size[1])
    return min(sizes, key=lambda one: abs(np.log(one[0] / one[1]) - shape))


def resized(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8, resized as the processors do."""
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def _as_is(batch: list[Piece]) -> list[Piece]:
    return batch
