"""Rows encoded once and read many times: with small targets, or many epochs, processing pictures is the slowest part.

Each file of data has a folder of its own, named by the file's path, size and time of writing, and by all that encoding
depends on (`Encoder.about`), so that runs share what they can and a changed file is encoded anew:

    offsets.npy   (rows + 1,) int64: row i is the bytes from offsets[i] to offsets[i + 1]
    rows.bin      each row: one byte, R or E, and then its tensors as safetensors, or why it is refused as UTF-8

A row holds what the processor gave, pixels included (megabytes for a picture of 1,000 tokens), so the folder is large
and best on a fast disk. The target still runs live on every batch.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from safetensors.torch import load, save

from speculens.checkpoints import whole
from speculens.data.sources import JsonLines
from speculens.errors import UserError
from speculens.training.batches import Encoder, Row, attempt

CHUNK = 32  # rows that a worker encodes at a time
AHEAD = 2  # chunks for each worker that are in the making or wait for their turn
INPUTS = "inputs."


class Encoded:
    """Encoded rows by number, those of several folders one after the other. Safe to share with forked workers."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._offsets = [np.load(folder / "offsets.npy") for folder in folders]
        self._bytes = [_mapped(folder / "rows.bin") for folder in folders]
        self._ends = [0, *accumulate(len(offsets) - 1 for offsets in self._offsets)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __call__(self, index: int) -> Row:
        """Raises UserError for a row that is refused."""
        part = bisect_right(self._ends, index) - 1
        line = index - self._ends[part]
        start, end = self._offsets[part][line : line + 2]
        return _unpacked(self._bytes[part][start:end].tobytes())


def _mapped(file: Path) -> np.ndarray:
    """The bytes of a file; nothing is no memory to map."""
    return np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.empty(0, dtype=np.uint8)


def encoded(folder: Path, source: JsonLines, encoder: Encoder, workers: int) -> Encoded:
    """The encoded rows of `source` under `folder`; `workers` processes make what is not there yet."""
    made, settings = [], encoder.about
    for part in source.parts:
        about = json.dumps([part.fingerprint, settings])
        made.append(folder / hashlib.sha256(about.encode()).hexdigest()[:16])
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # of several runs that start at once, one encodes and the others wait
            if not made[-1].exists():
                with whole(made[-1]) as unfinished:
                    _write(unfinished, part, encoder, workers)
    return Encoded(made)


def _write(folder: Path, source: JsonLines, encoder: Encoder, workers: int) -> None:
    console, count, offsets = Console(stderr=True), len(source), [0]
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    made = _made(partial(_chunk, source, encoder), chunks, workers)
    with (folder / "rows.bin").open("wb") as file:
        for rows in track(made, "encoding", len(chunks), console=console, disable=not console.is_terminal):
            for row in rows:
                file.write(row)
                offsets.append(offsets[-1] + len(row))
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))


_work: Callable[[range], list[bytes]]  # of a worker; forked with it, because a processor cannot always be pickled


def _made(make: Callable[[range], list[bytes]], chunks: list[range], workers: int) -> Iterator[list[bytes]]:
    """The rows of each chunk, in order. Raises UserError if a worker dies."""
    global _work  # noqa: PLW0603
    if not workers or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(make, chunks)
        return
    _work = make
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin_worker)
    ahead: deque[Future[list[bytes]]] = deque()  # bounded, because rows are large
    try:
        for chunk in chunks:
            ahead.append(pool.submit(_run, chunk))
            if len(ahead) > AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"One of {workers} workers was killed while it encoded rows, most likely because memory ran out: lower "
            "workers or free memory, and run the same again; data files that were encoded to their end are kept."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and without a word
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Else a worker would wait for ever for the work of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(chunk: range) -> list[bytes]:
    return _work(chunk)


def _chunk(source: JsonLines, encoder: Encoder, indices: range) -> list[bytes]:
    return [_packed(attempt(partial(encoder.fresh(source), index)), encoder.dtype) for index in indices]


def _packed(row: Row | UserError, dtype: torch.dtype) -> bytes:
    if isinstance(row, UserError):
        return b"E" + str(row).encode()
    tensors = {f"{INPUTS}{name}": tensor for name, tensor in row.inputs.items()}
    tensors |= {"image": row.image, "answer": row.answer}
    fitted = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return b"R" + save({name: tensor.contiguous() for name, tensor in fitted.items()})


def _unpacked(data: bytes) -> Row:
    if data[:1] == b"E":
        raise UserError(data[1:].decode())
    tensors = load(data[1:])
    image, answer = tensors.pop("image"), tensors.pop("answer")
    return Row({name.removeprefix(INPUTS): tensor for name, tensor in tensors.items()}, image, answer)
