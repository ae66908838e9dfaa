"""Real pictures with text and plain prose, read from packs of WebP files laid end to end."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

LONGEST_ANSWER = 1000  # characters; longer answers (mostly chart specifications) would crowd out the rest


@dataclass(frozen=True)
class Row:
    """One question about one picture. The picture stays on disk until `image()` is called."""

    id: str
    source: str
    split: str
    task: str
    question: str
    answer: str
    file: Path
    offset: int
    length: int

    def data(self) -> bytes:
        """The picture's WebP file."""
        with self.file.open("rb") as pack:
            pack.seek(self.offset)
            return pack.read(self.length)

    def image(self) -> Image.Image:
        """The decoded RGB picture."""
        with Image.open(io.BytesIO(self.data())) as picture:
            return picture.convert("RGB")


def rows(folder: Path | None, split: str) -> list[Row]:
    """Every (picture, turn) of `split` ("train" or "val") in the packs `NAME.jsonl` + `NAME.bin` of `folder`.

    Answers over `LONGEST_ANSWER` characters are left out. No folder, or no pack in it: an empty list.
    """
    found = []
    for index in sorted(folder.glob("*.jsonl")) if folder else []:
        with index.open(encoding="utf-8") as lines:
            for line in lines:
                found += _turns(json.loads(line), index.with_suffix(".bin"), split)
    return found


def _turns(record: dict, file: Path, split: str) -> list[Row]:
    if record["split"] != split:
        return []
    return [
        Row(
            record["id"],
            record["source"],
            split,
            turn["task"],
            turn["q"],
            turn["a"],
            file,
            record["off"],
            record["len"],
        )
        for turn in record["turns"]
        if len(turn["a"]) <= LONGEST_ANSWER
    ]


def prose(folder: Path | None) -> list[str]:
    """The paragraphs of every `prose*.jsonl.gz` in `folder`, in file order; an empty list without any."""
    paragraphs = []
    for file in sorted(folder.glob("prose*.jsonl.gz")) if folder else []:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            paragraphs += [json.loads(line)["text"] for line in lines]
    return paragraphs
