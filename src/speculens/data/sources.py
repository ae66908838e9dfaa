"""Where conversations come from. A row is read when it is asked for; only the offsets of lines are held."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from speculens.conversation import Conversation
from speculens.errors import UserError


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
        """Characters of text."""
        parts = (part for message in self._conversations[index].messages for part in message.content)
        return sum(len(part) for part in parts if isinstance(part, str))


class JsonLines:
    """One or more files of JSON lines, in the forms that `Conversation.from_row` reads.

    image_root  where relative picture paths start; None takes each file's own folder
    Safe to share with forked workers: reads carry their own offset.
    """

    def __init__(self, paths: Sequence[str | Path], image_root: str | Path | None = None) -> None:
        self._files = [_File(Path(path), image_root) for path in paths]
        self._ends = [0]
        for file in self._files:
            self._ends.append(self._ends[-1] + len(file))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        return self._place(index)[0].read(self._place(index)[1])

    def size(self, index: int) -> int:
        """Bytes of the line."""
        file, line = self._place(index)
        return file.size(line)

    def _place(self, index: int) -> tuple[_File, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index) - 1
        return self._files[number], index - self._ends[number]


class _File:
    """Offsets of the lines of one file; blank lines do not count."""

    def __init__(self, path: Path, image_root: str | Path | None) -> None:
        self.path, self.image_root = path, Path(image_root) if image_root else path.parent
        self._starts, self._lengths = array("q"), array("q")
        try:
            with path.open("rb") as file:
                start = 0
                for line in file:
                    if not line.isspace():
                        self._starts.append(start)
                        self._lengths.append(len(line))
                    start += len(line)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"The data file {path} cannot be read: {error.strerror}.") from None

    def __len__(self) -> int:
        return len(self._starts)

    def size(self, line: int) -> int:
        return self._lengths[line]

    def read(self, line: int) -> Conversation:
        data = os.pread(self._descriptor, self._lengths[line], self._starts[line])
        try:
            row = json.loads(data)
        except ValueError as error:
            raise UserError(f"Row {line + 1} of {self.path} is not valid JSON: {error}.") from None
        return Conversation.from_row(row, self.image_root)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
