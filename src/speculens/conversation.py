"""Messages and pictures in, whatever their source: one form for generation, data, benchmark and server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speculens.errors import UserError
from speculens.pictures import Image, Source, kind_of, load_image

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MARK = "<image>"  # where a picture stands in the text of LLaVA-style rows


@dataclass(frozen=True)
class Message:
    """One turn: who speaks ("system", "user" or "assistant"), and texts and RGB pictures in their order."""

    role: str
    content: tuple[str | Image, ...]


@dataclass(frozen=True)
class Conversation:
    """The messages so far; the target answers the last one."""

    messages: tuple[Message, ...]

    @classmethod
    def user(cls, text: str, images: Sequence[Source] = ()) -> Conversation:
        """One question about `images` (anything `load_image` takes), pictures first."""
        return cls((Message("user", (*map(load_image, images), text)),))

    @classmethod
    def from_row(
        cls, row: Mapping[str, Any], image_root: Path | None = None, load: Callable[[Source], Image] | None = None
    ) -> Conversation:
        """A row of data: `messages` or `conversations`, also LLaVA's (`from`, `value`, `<image>`), or MMSpec's `turns`.

        Relative paths start at `image_root`; `load` opens a picture (default `load_image`). A row of `turns` becomes
        one user message a turn, the pictures in the first. Raises UserError: which row, and what is wrong with it.
        """
        if not isinstance(row, Mapping):
            raise UserError(f"A row must be a JSON object, not {kind_of(row)}.")
        try:
            return cls(tuple(_messages(row, _Album(row, image_root, load or load_image))))
        except UserError as error:
            raise UserError(f"Row {row.get('id', '(without id)')!r}: {error}") from error

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures, in reading order."""
        return tuple(part for message in self.messages for part in message.content if not isinstance(part, str))

    def then(self, role: str, *content: str | Image) -> Conversation:
        """This conversation with one more message."""
        return Conversation((*self.messages, Message(role, content)))

    def to_chat(self) -> list[dict[str, Any]]:
        """The form `processor.apply_chat_template` takes."""
        return [
            {"role": message.role, "content": [_part_to_chat(part) for part in message.content]}
            for message in self.messages
        ]


def _part_to_chat(part: str | Image) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


# Rows of data


class _Album:
    """The pictures of one row: named in place, or listed under `image`/`images` and taken in order."""

    def __init__(self, row: Mapping[str, Any], root: Path | None, load: Callable[[Source], Image]) -> None:
        self.root, self.load = root, load
        listed = row.get("images") or row.get("image") or []
        self.listed = list(listed) if isinstance(listed, (list, tuple)) else [listed]
        self.taken = 0

    def open(self, source: Any) -> Image:
        """One picture: a path, URL, data URI, bytes, PIL image, or an object that holds one of them."""
        if isinstance(source, Mapping):
            keys = [key for key in ("image", "bytes", "path", "url") if source.get(key)]
            if not keys:
                raise UserError("a picture needs one of 'image', 'path' or 'url'.")
            return self.open(source[keys[0]])
        if isinstance(source, str) and not source.lower().startswith(("http://", "https://", "data:")):
            source = Path(source) if self.root is None else self.root / source
        return self.load(source)

    def next(self) -> Image:
        self.taken += 1
        if self.taken > len(self.listed):
            raise UserError(f"its messages ask for {self.taken} or more pictures, but it lists {len(self.listed)}.")
        return self.open(self.listed[self.taken - 1])

    def rest(self) -> list[Image]:
        return [self.next() for _ in self.listed[self.taken :]]


def _messages(row: Mapping[str, Any], album: _Album) -> list[Message]:
    entries = next((row[key] for key in ("messages", "conversations", "turns") if row.get(key)), None)
    if not isinstance(entries, (list, tuple)):
        raise UserError("it needs a non-empty list under 'messages', 'conversations' or 'turns'.")
    messages = [_message(entry, number, album) for number, entry in enumerate(entries, 1)]
    if album.listed and album.taken == 0:  # pictures without a mark in the text come first
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise UserError("it has pictures but no message of the user.")
        messages[first] = Message("user", (*album.rest(), *messages[first].content))
    if album.taken < len(album.listed):
        raise UserError(f"it lists {len(album.listed)} pictures, but its messages use {album.taken}.")
    return messages


def _message(entry: Any, number: int, album: _Album) -> Message:
    if isinstance(entry, str):  # a turn of MMSpec
        entry = {"role": "user", "content": entry}
    if not isinstance(entry, Mapping):
        raise UserError(f"message {number} must be an object, not {kind_of(entry)}.")
    speaker, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise UserError(f"message {number} is by {speaker!r}; known speakers are {', '.join(ROLES)}.")
    try:
        parts = tuple(_parts(content, album))
    except UserError as error:
        raise UserError(f"message {number}: {error}") from error
    if not parts:
        raise UserError(f"message {number} is empty.")
    return Message(ROLES[speaker], parts)


def _parts(content: Any, album: _Album) -> Iterator[str | Image]:
    if isinstance(content, str):
        yield from _split_marks(content, album)
    elif isinstance(content, (list, tuple)):
        for part in content:
            yield _part(part, album)
    else:
        raise UserError(f"its content must be a text or a list, not {kind_of(content)}.")


def _part(part: Any, album: _Album) -> str | Image:
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": source}:
            return album.open(source)
        case {"type": "image", **rest}:
            source = {key: value for key, value in rest.items() if value is not None}
            return album.open(source) if source else album.next()
    kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
    raise UserError(f"a part of type {kind!r} is not understood; use 'text', 'image' or 'image_url'.")


def _split_marks(text: str, album: _Album) -> Iterator[str | Image]:
    """Text with a picture at every mark, if the row lists pictures; a mark stands on a line of its own."""
    first, *others = text.split(MARK) if album.listed else [text]
    pieces = [first, *(piece.removeprefix("\n") for piece in others)]
    for number, piece in enumerate(pieces):
        if number:
            yield album.next()
        text = piece if number == len(others) else piece.removesuffix("\n")
        if text:
            yield text
