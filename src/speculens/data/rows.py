"""Rows of data on their way through: a name of their own, one form, pictures by reference, refusals by reason."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from speculens.conversation import Conversation, Message
from speculens.data.sources import JsonLines
from speculens.errors import UserError
from speculens.pictures import Image, Source, load_image

Row: TypeAlias = dict[str, Any]
OnRow: TypeAlias = Callable[[int, int], None]
"""Called with rows done and rows in all, for a bar of progress."""

# What the messages form replaces; whatever else a row says (category, topic, ...) stays.
REPLACED = frozenset({"id", "messages", "conversations", "turns", "image", "images"})
_QUOTED = re.compile(r"""(?<!\w)(['"])(?:\\.|(?!\1).)*\1(?!\w)""")


class Names:
    """Gives every row an id of its own: the row's, or else its place; one that comes again is numbered."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # by name that is taken: the last number given to it

    def name(self, row: Any, place: int) -> str | int:
        """The id of the row at a place (from 0)."""
        given = row.get("id") if isinstance(row, Mapping) else None
        name = given if isinstance(given, (str, int)) and str(given) else f"row-{place + 1}"
        own = name
        while str(own) in self._last:
            self._last[str(name)] += 1
            own = f"{name}#{self._last[str(name)]}"
        self._last[str(own)] = 1
        return own


class Pictures:
    """Opens the pictures of one row and says how a row of the file `output` names them.

    root    where the relative paths of the row start
    copies  a folder that takes a copy of every picture; None names each where it is: a file under `root` by its path
            from the folder of `output`, another by its absolute path, all else by its URL
    """

    def __init__(self, root: Path, output: Path, copies: Path | None = None) -> None:
        self._root, self._folder, self._copies = root, output.parent.resolve(), copies
        self._sources: dict[int, Source] = {}

    def read(self, row: Any) -> Conversation:
        """A row in any form that `Conversation.from_row` knows."""
        return Conversation.from_row(row, self._root, self._open)

    def messages(self, conversation: Conversation) -> list[Row]:
        """The `messages` of a row: a text as it is, pictures and texts as a list of parts."""
        return [{"role": message.role, "content": self._content(message)} for message in conversation.messages]

    def _open(self, source: Source) -> Image:
        picture = load_image(source)
        self._sources[id(picture)] = source
        return picture

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        if len(message.content) == 1 and isinstance(message.content[0], str):
            return message.content[0]
        return [
            {"type": "text", "text": part} if isinstance(part, str) else self._part(part) for part in message.content
        ]

    def _part(self, picture: Image) -> dict[str, str]:
        source = self._sources[id(picture)]
        if self._copies is not None:
            return {"type": "image", "path": self._from_output(_copied(source, picture, self._copies))}
        if not isinstance(source, Path):
            return {"type": "image", "url": str(source)}
        return {
            "type": "image",
            "path": self._from_output(source) if source.is_relative_to(self._root) else str(source),
        }

    def _from_output(self, path: Path) -> str:
        # Folders are resolved, because `..` behind a linked folder leads elsewhere; the file's own name stays.
        return Path(os.path.relpath(path.parent.resolve() / path.name, self._folder)).as_posix()


def _copied(source: Source, picture: Image, folder: Path) -> Path:
    """The picture in `folder`, under a name made of its content, so that one picture is there once."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        data, suffix = source.read_bytes(), source.suffix.lower()
    else:
        data, suffix = f"{picture.width}x{picture.height}".encode() + picture.tobytes(), ".png"
    file = folder / f"{hashlib.sha256(data).hexdigest()[:24]}{suffix}"
    if not file.exists():
        partial = file.with_name(f".{file.name}.partial")  # a kill must leave no half of a picture under its name
        if isinstance(source, Path):
            partial.write_bytes(data)
        else:
            picture.save(partial, "PNG")
        partial.replace(file)
    return file


def rest(row: Mapping[str, Any]) -> Row:
    """What a row says beside its id, messages and pictures."""
    return {key: value for key, value in row.items() if key not in REPLACED}


def line(row: Row) -> bytes:
    """A row as a line of a file. Halves of surrogate pairs, which no encoding takes, become question marks."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def error_file(output: Path) -> Path:
    """Where the refusals of an output are named: `rows.jsonl` has `rows_error.jsonl`."""
    return output.with_name(f"{output.stem}_error.jsonl")


def outputs(source: JsonLines, output: Path) -> tuple[Path, Path]:
    """The file of rows and its error file. Raises UserError if one of them is read from."""
    files = output, error_file(output)
    for file in files:
        if any(file.exists() and file.samefile(read) for read in source.paths):
            raise UserError(f"{file} is read from and would be written over: choose another output.")
    return files


def refusal(name: str | int, error: UserError) -> Row:
    """A line of the error file."""
    return {"id": name, "error": str(error), "reason": reason(error)}


def check_refusal(row: Row) -> None:
    """Raises UserError for a row that `refusal` has not made."""
    if "reason" not in row:
        raise UserError(f"Row {row['id']!r} of the error file beside the output is no refusal: choose another output.")


def reason(error: UserError) -> str:
    """The sentence without what only this row has: its id, names in quotes, numbers. Equal reasons are counted."""
    text = _QUOTED.sub("…", str(error))
    text = re.sub(r"^Row (…|\S+): ", "", text)
    return re.sub(r"\d[\d,.]*(?<=\d)", "N", text)
