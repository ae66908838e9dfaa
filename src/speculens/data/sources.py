"""Where conversations come from. A row is read when it is asked for; only the offsets of lines are held."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from speculens.conversation import Conversation
from speculens.errors import UserError

# What a picture weighs in the size of a row: 576 tokens (LLaVA-1.5's) of about four characters. Families differ, and
# how many it will be is known only once a row is encoded.
PICTURE = 2304
MARKS = (b'"image"', b'"images"', b'"image_url"', b"<image>")  # one of these stands in a row for each picture, or about


class Source(Protocol):
    """Numbered conversations."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation:
        """Raises UserError for a row that cannot be used; whoever reads counts these refusals."""

    def size(self, index: int) -> int:
        """How long the row is, in units that only compare with each other: rows of like size share a batch."""


class Listed:
    """Conversations that are in memory already."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations = conversations

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self._conversations[index]

    def size(self, index: int) -> int:
        """Characters of text, and what the pictures weigh."""
        parts = [part for message in self._conversations[index].messages for part in message.content]
        return sum(len(part) if isinstance(part, str) else PICTURE for part in parts)


class JsonLines:
    """One or more files of JSON lines, or of one JSON array, in the forms that `Conversation.from_row` reads.

    image_root  where relative picture paths start; None takes each file's own folder
    Safe to share with forked workers: reads carry their own offset.
    """

    def __init__(self, paths: Sequence[str | Path], image_root: str | Path | None = None) -> None:
        self.paths, self._image_root = list(map(Path, paths)), image_root
        self._files = [_File(path, image_root) for path in self.paths]
        self._ends = [0]
        for file in self._files:
            self._ends.append(self._ends[-1] + len(file))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        return Conversation.from_row(self.row(index), self.root(index))

    def row(self, index: int) -> Any:
        """The row as it stands in its file. Raises UserError if it is not valid JSON."""
        file, line = self._place(index)
        return file.row(line)

    def root(self, index: int) -> Path:
        """Where the relative picture paths of a row start."""
        return self._place(index)[0].image_root

    def size(self, index: int) -> int:
        """Bytes of the row, and what the pictures named in it weigh."""
        file, line = self._place(index)
        return file.size(line)

    @property
    def parts(self) -> list[JsonLines]:
        """A source for each file alone."""
        return [JsonLines([path], self._image_root) for path in self.paths]

    @property
    def fingerprint(self) -> list[list[str | int]]:
        """Of each file, what tells that it is still the same: its place, where its pictures are, size and time."""
        return [[str(file.path.resolve()), str(file.image_root.resolve()), *file.state] for file in self._files]

    def _place(self, index: int) -> tuple[_File, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index) - 1
        return self._files[number], index - self._ends[number]


class _File:
    """Offsets of the rows of one file: its lines, blank ones left out, or the elements of its array."""

    def __init__(self, path: Path, image_root: str | Path | None) -> None:
        self.path, self.image_root = path, Path(image_root) if image_root else path.parent
        self._starts, self._lengths, self._pictures = array("q"), array("q"), array("q")
        try:
            with path.open("rb") as file:
                for start, text in _elements(file, path) if _is_array(file) else _lines(file):
                    self._starts.append(start)
                    self._lengths.append(len(text))
                    self._pictures.append(max(text.count(mark) for mark in MARKS))
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"The data file {path} cannot be read: {error.strerror}.") from None

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def state(self) -> tuple[int, int]:
        """Bytes of the file, and when it was last written, in nanoseconds."""
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns

    def size(self, line: int) -> int:
        return self._lengths[line] + PICTURE * self._pictures[line]

    def row(self, line: int) -> Any:
        data = os.pread(self._descriptor, self._lengths[line], self._starts[line])
        try:
            return json.loads(data)
        except ValueError as error:
            raise UserError(f"Row {line + 1} of {self.path} is not valid JSON: {error}.") from None
        except RecursionError:
            raise UserError(f"Row {line + 1} of {self.path} is nested too deeply to be read.") from None

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _is_array(file: BinaryIO) -> bool:
    """Whether the first sign is a bracket; a row never begins with one."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    sign = b" "
    while sign.isspace():
        sign = file.read(1)
    file.seek(0)
    return sign == b"["


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Start of every line that is not blank, and the line."""
    start = 0
    for line in file:
        if not line.isspace():
            yield start, line
        start += len(line)


def _elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Start of every element of an array, and the element."""
    data = file.read()
    text = data.decode("latin-1")  # one character a byte; brackets and quotes are the same in UTF-8
    decode = json.JSONDecoder().raw_decode
    start = _skip(text, text.index("[") + 1, "")
    try:
        while text[start] != "]":
            _, end = decode(text, start)
            yield start, data[start:end]
            start = _skip(text, end, ",")
    except (ValueError, IndexError):
        raise UserError(f"The data file {path} is no whole JSON array: it breaks at byte {start:,}.") from None
    except RecursionError:
        raise UserError(f"The data file {path} is nested too deeply to be read, at byte {start:,}.") from None


def _skip(text: str, start: int, sign: str) -> int:
    """The place of the next character that is neither white nor `sign`."""
    while start < len(text) and (text[start].isspace() or text[start] in sign):
        start += 1
    return start
