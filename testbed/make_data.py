"""Writes drawn pictures with questions and answers as a data set: `python -m testbed.make_data --out DIR --count N`.

DIR/data.jsonl has one row per picture (docs/data.md), DIR/images/000/000000.png and so on the pictures, 1000 in
a folder. DIR/val is another such data set, to measure on: pictures of another seed, and one textbook figure in
`WITHHELD`.
The same arguments write the same files, whatever the number of workers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from testbed import draw, packs
from testbed.charts import Size

CHUNK = 1000  # pictures per folder and per piece of work
WITHHELD = 80  # of so many real pictures with a description, one is kept for DIR/val
VAL_SEED = 1000  # added to the seed of the training pictures


def main(arguments: list[str] | None = None) -> None:
    """The command line; `arguments` are those of the process by default."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed.make_data", description="Write a data set of drawn pictures."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for data.jsonl and images/")
    parser.add_argument("--count", type=int, required=True, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="0 is the training set, 1 the held-out set")
    parser.add_argument("--size", type=_size, help="WxH in pixels; by default all sizes in turn")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--val", type=int, default=24, help="drawn pictures of DIR/val")
    parser.add_argument("--packs", type=Path, help="folder of real packs whose training rows are added")
    given = parser.parse_args(arguments)
    write(given.out, given.count, given.seed, given.size, given.workers)
    write(given.out / "val", given.val, given.seed + VAL_SEED, given.size, 1)
    real = packs.rows(given.packs, "train")
    withheld = {row.id for row in [row for row in real if row.task == "describe"][::WITHHELD]}
    _add_real(given.out, [row for row in real if row.id not in withheld])
    _add_real(given.out / "val", [row for row in real if row.id in withheld and row.task == "describe"])


def _size(text: str) -> Size:
    try:
        width, height = (int(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WxH, for example 256x256") from None
    if (width, height) not in draw.SIZES:
        known = ", ".join(f"{w}x{h}" for w, h in draw.SIZES)
        raise argparse.ArgumentTypeError(f"{text} is not one of {known}")
    return width, height


def write(out: Path, count: int, seed: int, size: Size | None, workers: int) -> None:
    """Writes `count` rows to `out`; `size` None takes `draw.SIZES` in turn."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    out.mkdir(parents=True, exist_ok=True)
    begun, done = time.perf_counter(), 0
    with (out / "data.jsonl").open("w", encoding="utf-8") as lines:
        for rows in _made(partial(_chunk, out, seed, size), chunks, workers):
            lines.writelines(json.dumps(row) + "\n" for row in rows)
            done += len(rows)
            rate = done / (time.perf_counter() - begun)
            print(f"\r{done}/{count} pictures, {rate:.0f}/s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _made(make: partial[list[dict[str, Any]]], chunks: list[range], workers: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of each chunk, in order."""
    if workers < 2:
        yield from map(make, chunks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(make, chunks)


def _chunk(out: Path, seed: int, size: Size | None, indices: range) -> list[dict[str, Any]]:
    folder = Path("images") / f"{indices[0] // CHUNK:03d}"
    (out / folder).mkdir(parents=True, exist_ok=True)
    return [_row(out, folder, seed, size or draw.SIZES[index % len(draw.SIZES)], index) for index in indices]


def _add_real(out: Path, rows: list[packs.Row]) -> None:
    """Append the rows of real packs; their pictures are copied byte for byte."""
    (out / "images" / "real").mkdir(parents=True, exist_ok=True)
    with (out / "data.jsonl").open("a", encoding="utf-8") as lines:
        for number, row in enumerate(rows):
            path = Path("images") / "real" / f"{number:05d}.webp"
            (out / path).write_bytes(row.data())
            metadata = {"kind": row.source, "task": row.task}
            lines.write(json.dumps(conversation(row.id, path, row.question, row.answer, metadata)) + "\n")


def _row(out: Path, folder: Path, seed: int, size: Size, index: int) -> dict[str, Any]:
    made = draw.sample(seed, index, size)
    path = folder / f"{index:06d}.png"
    made.image.save(out / path)
    metadata = {"kind": made.kind, "task": made.task, "facts": made.facts}
    return conversation(f"{seed}-{index}", path, made.question, made.answer, metadata)


def conversation(name: str, path: Path, question: str, answer: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """One row of the project's data format."""
    picture = {"type": "image", "path": path.as_posix()}
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": [picture, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ],
        "metadata": metadata,
    }


if __name__ == "__main__":
    main()
