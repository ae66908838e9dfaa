"""Suites of questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculens.conversation import Conversation
from speculens.data.rows import Names
from speculens.data.sources import JsonLines


@dataclass(frozen=True)
class Case:
    """A conversation of a suite. Its pictures are opened when it is asked for.

    name   one of its own within the suite
    topic  under which its figures are pooled
    row    in any form that `Conversation.from_row` knows; the user's messages are asked, answers are not read
    root   where relative picture paths start
    """

    name: str
    topic: str
    row: Mapping[str, Any]
    root: Path

    def conversation(self) -> Conversation:
        """Raises UserError for a row or a picture that cannot be used."""
        return Conversation.from_row(self.row, self.root)


def from_files(files: Sequence[Path], image_root: Path | None = None, limit: int | None = None) -> list[Case]:
    """The rows of files in the data format, taken from the files in turn; the topic is the row's own, or the file's."""
    sources = [JsonLines([file], image_root) for file in files]
    names, cases = Names(), []
    for index in range(max(map(len, sources), default=0)):
        for file, source in zip(files, sources, strict=True):
            if index < len(source):
                row = source.row(index)
                topic = row.get("topic") or row.get("category") or file.stem
                cases.append(Case(str(names.name(row, index)), str(topic), row, source.root(index)))
    return cases[:limit]
